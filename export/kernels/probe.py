"""A probe: the times of matrix products on this machine."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from export.kernels.kernels import KERNELS, Timer, Timing
from mistill.cost_model.processors import MOST_THREADS
from mistill.cost_model.products import Kernel
from mistill.errors import FolderError, SettingsError
from mistill.folders.folder import open_folder, read_config, read_json
from mistill.folders.publishing import refuse_existing, write_json
from mistill.settings import require_range

HERE = "here"
"""The value of ``tune_for`` that means this machine."""

# Common shapes of matrices, for a probe without a model.
USUAL_SHAPES = ((960, 576), (576, 1536), (3072, 576), (2048, 2048), (4096, 4096), (4096, 11008))


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The times of matrix products on a machine.

    Attributes:
        machine: The processor, in words.
        threads: Threads that multiplied.
        memory_bytes_per_second: Memory bandwidth of the machine.
        timings: Time of a product by kernel, rows and columns.
    """

    machine: str
    threads: int
    memory_bytes_per_second: float
    timings: Mapping[tuple[Kernel, int, int], Timing]

    def timing(self, kernel: Kernel, rows: int, columns: int) -> Timing | None:
        """The time of a product, measured or scaled from the most similar matrix.

        Args:
            kernel: Kernel of the product.
            rows: Rows of the matrix.
            columns: Columns of the matrix.

        Returns:
            Measured, or scaled by weights from the matrix nearest in columns, then in rows, of
            those that most kernels were timed on; None if the kernel was not timed.
        """
        exact = self.timings.get((kernel, rows, columns))
        if exact is not None:
            return exact
        timed: dict[tuple[int, int], set[Kernel]] = {}
        for timed_kernel, *shape in self.timings:
            timed.setdefault((shape[0], shape[1]), set()).add(timed_kernel)
        # All kernels are compared on the same matrix, as two would differ in more than kernels.
        most = max(map(len, timed.values()), default=0)
        shapes = [shape for shape, kernels in timed.items() if len(kernels) == most]
        if not shapes or kernel not in timed[shapes[0]]:
            return None
        nearest = min(
            shapes,
            key=lambda shape: (_apart(shape[1], columns), _apart(shape[0], rows)),
        )
        of_nearest = self.timings[kernel, *nearest]
        scale = rows * columns / (nearest[0] * nearest[1])
        return Timing(token=of_nearest.token * scale, prompt=of_nearest.prompt * scale)

    def save(self, file: str | Path) -> Path:
        """Write the probe to a file, for ``tune_for`` on another machine.

        Args:
            file: A .json file.

        Returns:
            The file.
        """
        document = {
            "mistill_probe": 1,
            "machine": self.machine,
            "threads": self.threads,
            "memory_bytes_per_second": self.memory_bytes_per_second,
            "timings": [
                {**asdict(kernel), "rows": rows, "columns": columns, **asdict(timing)}
                for (kernel, rows, columns), timing in self.timings.items()
            ],
        }
        write_json(Path(file), document, indent=1)
        return Path(file)


def run_probe(
    shapes: Iterable[tuple[int, int]],
    timer: Timer,
    *,
    machine: str,
    threads: int,
    memory_bytes_per_second: float,
) -> Probe:
    """Time every kernel on every shape.

    Args:
        shapes: Rows and columns.
        timer: Function that times products.
        machine: The processor, in words.
        threads: Threads that the timer multiplies with.
        memory_bytes_per_second: Memory bandwidth of the machine.

    Returns:
        The probe.
    """
    timings = {
        (kernel, rows, columns): timing
        for rows, columns in dict.fromkeys(shapes)
        for kernel, timing in timer(
            [one for one in KERNELS if columns % max(one.block, 1) == 0], rows, columns
        ).items()
    }
    return Probe(
        machine=machine,
        threads=threads,
        memory_bytes_per_second=memory_bytes_per_second,
        timings=timings,
    )


def probe_here(
    shapes: Iterable[tuple[int, int]] = USUAL_SHAPES, *, threads: int | None = None
) -> Probe:
    """Time matrix products on this machine, which takes some seconds.

    Args:
        shapes: Rows and columns of the matrices that are timed.
        threads: Threads to multiply with; the processors that may be used if None.

    Returns:
        The probe.
    """
    from export.kernels.kernels import OnnxTimer
    from mistill.cost_model.onnx_cost import memory_speed
    from mistill.cost_model.processors import usable_threads, warn_if_busy

    count = threads or usable_threads()
    warn_if_busy(count)
    return run_probe(
        shapes,
        OnnxTimer(count),
        machine=_processor(),
        threads=count,
        memory_bytes_per_second=memory_speed(count),
    )


def probe_cpu(
    target: str | Path,
    *,
    model: str | Path | None = None,
    threads: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Time matrix products on this machine and save them, for ``tune_for`` on another one.

    Args:
        target: The .json file to write.
        model: A model folder whose matrices are timed; matrices of usual sizes if None.
        threads: Threads to multiply with; the processors that may be used if None.
        overwrite: Replace the target if it exists.

    Returns:
        The target.

    Raises:
        SettingsError: If threads are fewer than 1.
    """
    from export.weights.architecture import read_architecture
    from export.weights.shapes import product_shapes

    require_range("threads", threads, 1, MOST_THREADS)
    file = refuse_existing(target, overwrite)
    shapes: Iterable[tuple[int, int]] = USUAL_SHAPES
    if model is not None:
        architecture = read_architecture(read_config(open_folder(model).path))
        shapes = [(rows, columns) for rows, columns, _ in product_shapes(architecture).values()]
    return probe_here(shapes, threads=threads).save(file)


def read_probe(file: str | Path) -> Probe:
    """Read a probe that ``Probe.save`` wrote.

    Args:
        file: Path of the file.

    Returns:
        The probe.

    Raises:
        SettingsError: If there is no such file, or it is something else.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise SettingsError(
            f"tune_for is {str(file)!r}; give {HERE}, or a file that mistill probe wrote"
        )
    try:
        document = read_json(path)
        if document.get("mistill_probe") != 1:
            raise KeyError("mistill_probe")
        return Probe(
            machine=str(document["machine"]),
            threads=int(document["threads"]),
            memory_bytes_per_second=float(document["memory_bytes_per_second"]),
            timings={
                (
                    Kernel(entry["form"], int(entry["block"])),
                    int(entry["rows"]),
                    int(entry["columns"]),
                ): Timing(token=float(entry["token"]), prompt=float(entry["prompt"]))
                for entry in document["timings"]
            },
        )
    except (FolderError, KeyError, TypeError, ValueError) as error:
        raise SettingsError(
            f"{path} is not a probe: {error}; make one with: mistill probe {path.name}"
        ) from error


def _apart(first: int, second: int) -> float:
    return max(first, second) / min(first, second)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
