"""`moe3d-export` that takes the traced file from a finished bundle instead of tracing, which takes 20 s.

    python quick_export.py FINISHED_BUNDLE SOURCE -o BUNDLE ...

Everything else is the command's own: its processes, its folders, its locks, its stages but the tracer. With
QUICK_EXPORT_SPARE_BYTES in the environment, that stage may map so much more than it has when its libraries are loaded.
"""

import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

from moe3d_deploy.child import Emit

_PIECE = 64 << 10
_PAUSE_SECONDS = 0.02  # per piece, so that a kill has something to hit


def export_stage(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child stage: the pipeline's own, with a copy of the finished file in place of what the tracer gives."""
    from moe3d_deploy.export import graph, pipeline

    finished = Path(request.pop("finished"))

    def copy(model: Any, folder: Path, *arguments: Any, progress: Any = None, **options: Any) -> Path:
        for phase in ("trace", "translate", "write"):
            if progress:
                progress(phase)
        for name in ("model.onnx.data", "model.onnx"):
            with open(finished / name, "rb") as source, open(Path(folder) / name, "wb") as target:
                while piece := source.read(_PIECE):
                    target.write(piece)
                    target.flush()
                    time.sleep(_PAUSE_SECONDS)
        return Path(folder) / "model.onnx"

    graph.export_onnx = copy
    if spare := os.environ.get("QUICK_EXPORT_SPARE_BYTES"):
        mapped = re.findall(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
        resource.setrlimit(resource.RLIMIT_AS, (int(mapped[0]) * 1024 + int(spare),) * 2)
    return pipeline.export_stage(request, emit)


def main() -> int:
    from moe3d_deploy.cli.main import export_main
    from moe3d_deploy.export import pipeline

    finished, real = sys.argv.pop(1), pipeline.run_in_child

    def run(function: str, request: dict[str, Any], **options: Any) -> Any:
        if function.endswith(":export_stage"):
            function, request = "quick_export:export_stage", {**request, "finished": finished}
        return real(function, request, **options)

    pipeline.run_in_child = run
    return export_main()


if __name__ == "__main__":
    sys.exit(main())
