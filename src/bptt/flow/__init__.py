"""Measurements of how gradients flow through time, in a layer or a model of the user's own, on a batch of its own.

`record` runs stages 1 and 2 once and returns a `Recording`. Every measurement takes such a recording, or the arguments
that `record` takes, and returns a frozen dataclass of NumPy arrays (float64). Nothing here draws a picture, and nothing
changes a gradient or a parameter. Only `adapt` changes anything: how far a layer's adaptive policy reaches.
"""

from ._adaptive import Adapted as Adapted
from ._adaptive import adapt as adapt
from ._adaptive import adapted as adapted
from ._adaptive import smallest_window as smallest_window
from ._by_lag import Lags as Lags
from ._by_lag import by_lag as by_lag
from ._cell_path import CellPath as CellPath
from ._cell_path import cell_path as cell_path
from ._chain import Chain as Chain
from ._compare import POLICIES as POLICIES
from ._compare import Comparison as Comparison
from ._compare import Row as Row
from ._compare import compare as compare
from ._diagnose import diagnose as diagnose
from ._doctor import Watch as Watch
from ._doctor import watch as watch
from ._doctor_findings import Diagnosis as Diagnosis
from ._doctor_findings import Examination as Examination
from ._doctor_findings import Finding as Finding
from ._doctor_findings import Kind as Kind
from ._doctor_findings import Place as Place
from ._doctor_findings import Stage as Stage
from ._gates import Gates as Gates
from ._gates import gates as gates
from ._jacobians import Jacobians as Jacobians
from ._jacobians import Products as Products
from ._jacobians import jacobians as jacobians
from ._jacobians import products as products
from ._lags import LagMap as LagMap
from ._lags import lag_map as lag_map
from ._lyapunov import Lyapunov as Lyapunov
from ._lyapunov import lyapunov as lyapunov
from ._pairs import pairs as pairs
from ._recording import Recording as Recording
from ._recording import record as record
from ._recurrent import record_scan as record_scan
from ._scanned import Scanned as Scanned
from ._scanned import scanned as scanned
from ._setting import Setting as Setting
from ._shares import Shares as Shares
from ._shares import shares as shares
from ._spectrum import Directions as Directions
from ._spectrum import Spectrum as Spectrum
from ._spectrum import directions as directions
from ._spectrum import spectrum as spectrum
from ._steps import StepChain as StepChain
from ._steps import steps as steps
from ._survey import LARGEST as LARGEST
from ._survey import STAGES as STAGES
from ._survey import Survey as Survey
from ._survey import survey as survey
from ._verdict import Verdict as Verdict
from ._verdict import verdict as verdict
from .conclusions import conclusion as conclusion
from .language import language as language
