"""What a survey has found as one interactive page, which needs no network and no other file.

`bptt.report` needs plotly (`pip install 'bptt[report]'`) and is imported by its own name.
"""

try:
    from ._write import write as write
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing != "plotly":
        raise
    raise ImportError(f"bptt.report needs {missing}: pip install 'bptt[report]'") from None
