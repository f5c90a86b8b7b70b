"""How fast: contests between bptt and what else there is, checked before they are timed.

    cases -> contests (layers, windows, steps, training, short) -> bptt.clock -> rows -> results -> markdown, verdicts

`STEP_CELLS` are the steps that the table of steps times.

`measure` runs a `Selection` in this process, `measured` in one that is held to some cores. Nothing here prints.
"""

from .calibrating import CALIBRATED as CALIBRATED
from .calibrating import CALIBRATED_CELLS as CALIBRATED_CELLS
from .calibrating import CALIBRATION_TABLES as CALIBRATION_TABLES
from .calibrating import calibration_of as calibration_of
from .cases import SHAPES as SHAPES
from .cases import Case as Case
from .contest import TOLERANCE as TOLERANCE
from .contest import Contest as Contest
from .contest import largest_error as largest_error
from .layers import NAMES as NAMES
from .layers import PEERS as PEERS
from .layers import Problem as Problem
from .layers import layer_call as layer_call
from .limited import COMPILE_SECONDS as COMPILE_SECONDS
from .markdown import bounds_markdown as bounds_markdown
from .markdown import markdown as markdown
from .markdown import short_markdown as short_markdown
from .markdown import steps_markdown as steps_markdown
from .process import can_hold as can_hold
from .process import measured as measured
from .reach import Verdict as Verdict
from .reach import judge as judge
from .results import Machine as Machine
from .results import Results as Results
from .results import Row as Row
from .step_cells import STEP_CELLS as STEP_CELLS
from .step_cells import StepCell as StepCell
from .step_cells import StepProblem as StepProblem
from .steps import STEP_SHAPES as STEP_SHAPES
from .tables import TABLES as TABLES
from .tables import Selection as Selection
from .tables import measure as measure
from .words import digits as digits
