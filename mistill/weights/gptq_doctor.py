"""Check the tensors of a GPTQ folder against its config.json, and detect their format.

Many folders say ``gptq`` in config.json and hold the zero points of ``gptq_v2``, so that a reader
decodes weights that are all off by one step. The format is detected from the data. Zero points that
are all equal are the middle code, or one less. Where they vary, the codes decide: weights lie about
0 on both sides, so that as many codes are above the zero point of their group as below it, which
does not hold one step further.

A zero point of 0 that is stored minus one is another problem. Subtracted from the whole 32-bit
word, as the format says, it borrows from the next code, and a reader that adds one to each code by
itself decodes the neighbour wrongly. AutoGPTQ before 0.5 stored it as a whole word of ones, over
all the codes above it, which are lost.

Only zero points, indices and scales are read, and some rows of the codes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mistill.errors import FolderError
from mistill.folders.folder import AUTO_GPTQ_CONFIG, read_config, read_json
from mistill.folders.gptq_format import (
    EMBEDDING,
    HEAD,
    CheckpointFormat,
    GptqFormat,
    ModuleFormat,
    read_quantization,
)
from mistill.folders.settled_config import says_tied
from mistill.weights.code_words import codes_per_unit, plus_one, unpack_rows
from mistill.weights.gptq_layout import quantized_modules
from mistill.weights.gptq_shapes import columns_of, wrong_shapes
from mistill.weights.tensor_files import TensorFiles

ColumnOrder = Literal["plain", "mixed"]

# Matrices whose codes are read, and how many codes of each.
_SAMPLED = 24
_CODES = 1 << 19
# Share of the sampled matrices that must be decided, and of these that must agree.
_DECIDED = 0.25
_AGREEMENT = 0.9


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The format and the faults of the tensors of a GPTQ folder.

    Attributes:
        matrices: How many matrices are stored as codes.
        bits: Bits per code, and of how many matrices.
        checkpoint_format: How zero points are stored, detected from the data; None if undecided.
        evidence: What the format was detected from.
        symmetric: Whether all zero points are the middle of the code range.
        order: Whether the columns of each group lie side by side ("plain"), or groups are mixed
            as act-order leaves them ("mixed").
        index: Whether the files hold ``g_idx``.
        scale_types: Types of the scales, and of how many matrices.
        borrowed: Zero points of 0 that are stored minus one, and so borrow from a neighbour.
        overwritten: Words of zero points that were overwritten by a zero point of 0.
        contradictions: Differences between the data and config.json, and damage.
        notes: Remarks on sound data that some readers decode wrongly or slowly.
    """

    matrices: int
    bits: dict[int, int]
    checkpoint_format: CheckpointFormat | None
    evidence: str
    symmetric: bool
    order: ColumnOrder
    index: bool
    scale_types: dict[str, int]
    borrowed: int
    overwritten: int
    contradictions: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON values.

        Returns:
            One entry per field.
        """
        return {
            **asdict(self),
            "bits": {str(bits): count for bits, count in self.bits.items()},
            "contradictions": list(self.contradictions),
            "notes": list(self.notes),
        }


def require_sound(folder: Path) -> None:
    """Refuse a GPTQ folder whose data contradicts its config.json.

    Args:
        folder: A GPTQ folder.

    Raises:
        FolderError: If there is a contradiction; the message names it.
    """
    wrong = examine(folder).contradictions
    if wrong:
        more = f"; and {len(wrong) - 3} more" if wrong[3:] else ""
        raise FolderError(f"{folder} contradicts itself: {'; '.join(wrong[:3])}{more}")


def examine(folder: Path) -> Diagnosis:
    """Detect the format of the tensors of a GPTQ folder, and check them.

    Args:
        folder: A folder whose files are there and whose config.json says GPTQ.

    Returns:
        The diagnosis; contradictions do not raise.

    Raises:
        FolderError: If config.json does not say how the folder is stored.
    """
    config = read_config(folder)
    layout = read_quantization(config)
    if layout is None:
        raise FolderError(f"{folder} is not a GPTQ folder: its config.json does not say so")
    files = TensorFiles(folder)
    modules = quantized_modules(files)
    findings = _Findings(layout)
    if not modules:
        findings.wrong.append("config.json says GPTQ, but no module is stored as codes")
    sampled = set(modules[:: max(1, len(modules) // _SAMPLED)])
    for module in modules:
        findings.check(files, module, module in sampled)
    findings.wrong += _missing_tables(layout, modules, says_tied(config))
    findings.wrong += _two_configs(folder, config)
    return findings.diagnosis(len(modules))


@dataclass
class _Findings:
    """Counts and faults of the matrices checked so far."""

    layout: GptqFormat
    wrong: list[str] = field(default_factory=list)
    bits: Counter[int] = field(default_factory=Counter)
    scale_types: Counter[str] = field(default_factory=Counter)
    # Matrices whose zero points are all the middle code, all one less, or vary.
    all_middle: int = 0
    all_below: int = 0
    varying: list[str] = field(default_factory=list)
    varying_but_symmetric: list[str] = field(default_factory=list)
    votes: Counter[str] = field(default_factory=Counter)
    mixed: list[str] = field(default_factory=list)
    # Matrices whose index leaves groups without a column.
    unfilled: list[str] = field(default_factory=list)
    index: bool = False
    zeros_of_0: int = 0
    borrowing: int = 0
    overwritten: int = 0
    by_chance: float = 0.0

    def check(self, files: TensorFiles, module: str, with_codes: bool) -> None:
        """Check one matrix, and its codes too if asked to."""
        form = self.layout.format_of(module)
        if form is None:
            self.wrong.append(f"config.json leaves {module} float, but it is stored as codes")
            return
        problem = wrong_shapes(files, module, form)
        if problem:
            self.wrong.append(problem)
            return
        self.bits[form.bits] += 1
        self.scale_types[files.dtype(f"{module}.scales")] += 1
        if not _finite(files, f"{module}.scales"):
            self.wrong.append(f"{module}.scales holds a value that is not a finite number")
        outputs = files.shape(f"{module}.scales")[1]
        groups = self._check_order(files, module, form)
        words = np.ascontiguousarray(files.raw(f"{module}.qzeros")).view(np.uint32)
        stored = unpack_rows(words, form.bits)[:, :outputs]
        middle = 1 << (form.bits - 1)
        if (stored == middle).all():
            self.all_middle += 1
        elif (stored == middle - 1).all():
            self.all_below += 1
        else:
            self.varying.append(module)
            if form.symmetric:
                self.varying_but_symmetric.append(module)
            if with_codes:
                vote = detect_format(files, module, form.bits, stored, groups)
                self.votes[vote or "undecided"] += 1
            zeros = unpack_rows(plus_one(words, form.bits), form.bits)[:, :outputs]
            self.zeros_of_0 += int((zeros == 0).sum())
            self._count_overwritten(words, form.bits)

    def _check_order(
        self, files: TensorFiles, module: str, form: ModuleFormat
    ) -> NDArray[np.int32]:
        columns = columns_of(files, module, form.bits)
        size = columns if form.group_size == -1 else form.group_size
        plain = np.arange(columns, dtype=np.int32) // np.int32(size)
        if f"{module}.g_idx" not in files:
            return plain
        self.index = True
        groups = np.array(files.raw(f"{module}.g_idx"))
        count = files.shape(f"{module}.scales")[0]
        if not 0 <= int(groups.min()) <= int(groups.max()) < count:
            self.wrong.append(f"{module}.g_idx names groups beyond the {count} that have scales")
            return plain
        if len(np.unique(groups)) < count:
            self.unfilled.append(module)
            return plain
        if not np.array_equal(groups, plain):
            self.mixed.append(module)
        return groups

    def _count_overwritten(self, words: NDArray[np.uint32], bits: int) -> None:
        if bits == 3:
            return  # each code of 3 bits wraps by itself
        lanes = unpack_rows(words, bits).reshape(*words.shape, -1)
        ones = lanes == (1 << bits) - 1
        inside = ones[..., :-1].any(-1)  # a 0 in the last lane borrows from no code
        if not inside.any():
            return
        ones, share_of_1 = ones[inside], float((lanes == 0).mean())
        to_the_end = np.logical_and.accumulate(ones[:, ::-1], axis=-1)[:, ::-1]
        run = (ones == to_the_end).all(-1)
        self.overwritten += int(run.sum())
        self.borrowing += int((~run).sum())
        # Zero points of 1 above a zero point of 0 give the same bits.
        self.by_chance += float((share_of_1 ** (to_the_end[run].sum(-1) - 1)).sum())

    def diagnosis(self, matrices: int) -> Diagnosis:
        detected, evidence = self._detected_format()
        layout = self.layout
        if detected is not None and detected != layout.checkpoint_format:
            self.wrong.append(
                f"config.json says checkpoint_format {layout.checkpoint_format}, but the data is "
                f"{detected}: {evidence}"
            )
        if self.all_middle and self.all_below:
            self.wrong.append(
                f"{self.all_below} matrices store symmetric zero points minus one and "
                f"{self.all_middle} as they are"
            )
        if self.varying_but_symmetric:
            self.wrong.append(
                "config.json says sym, but the zero points vary in "
                + _few(self.varying_but_symmetric)
            )
        if self.unfilled:
            self.wrong.append(
                f"g_idx leaves groups without a column in {_few(self.unfilled)}: it was not "
                "filled in, and the groups are probably in order; remove the g_idx tensors, or "
                "quantize the float model again"
            )
        if self.mixed and not layout.activation_order:
            self.wrong.append(
                f"config.json says desc_act false, but g_idx mixes groups in {_few(self.mixed)}"
            )
        lost = self._lost_words(detected or layout.checkpoint_format)
        if lost:
            self.wrong.append(
                f"{lost} words of zero points were overwritten where a zero point of 0 was stored "
                "minus one, as AutoGPTQ did before 0.5; they cannot be recovered: quantize the "
                "float original again"
            )
        minus_one = (detected or layout.checkpoint_format) == "gptq"
        borrowed = self.zeros_of_0 if minus_one and self.varying and not lost else 0
        return Diagnosis(
            matrices=matrices,
            bits=dict(sorted(self.bits.items())),
            checkpoint_format=detected,
            evidence=evidence,
            symmetric=not self.varying,
            order="mixed" if self.mixed else "plain",
            index=self.index,
            scale_types=dict(self.scale_types),
            borrowed=borrowed,
            overwritten=lost,
            contradictions=tuple(self.wrong),
            notes=tuple(self._notes(borrowed)),
        )

    def _detected_format(self) -> tuple[CheckpointFormat | None, str]:
        if self.all_below and not self.all_middle:
            return "gptq", "symmetric zero points are stored as one less than the middle code"
        if self.all_middle and not self.all_below:
            return "gptq_v2", "symmetric zero points are stored as the middle code"
        sampled = sum(self.votes.values())
        decided = self.votes["gptq"] + self.votes["gptq_v2"]
        if sampled and decided >= _DECIDED * sampled:
            if self.votes["gptq"] >= _AGREEMENT * decided:
                return "gptq", (
                    "as many codes lie above as below their zero points once these are raised by "
                    f"one, in {self.votes['gptq']} of {sampled} matrices"
                )
            if self.votes["gptq_v2"] >= _AGREEMENT * decided:
                return "gptq_v2", (
                    "as many codes lie above as below their zero points, in "
                    f"{self.votes['gptq_v2']} of {sampled} matrices"
                )
        return None, "the codes of the sampled matrices do not decide it"

    def _lost_words(self, checkpoint_format: CheckpointFormat) -> int:
        """Words that were overwritten: where one zero point of 0 overwrites its word, all do."""
        if checkpoint_format != "gptq" or self.borrowing or self.by_chance > 0.01:
            return 0
        return self.overwritten

    def _notes(self, borrowed: int) -> list[str]:
        notes = []
        if borrowed:
            notes.append(
                f"{borrowed} zero points of 0 are stored minus one: a reader that adds one to each "
                "code instead of each word decodes their neighbours wrongly; "
                "`mistill quantize convert --to gptq_v2` avoids that"
            )
        if self.layout.activation_order and not self.mixed:
            notes.append(
                "config.json says desc_act, but the groups are in order: readers may ignore g_idx"
            )
        if not self.layout.symmetric and self.bits and not self.varying:
            notes.append("config.json says asymmetric, but all zero points are the middle code")
        return notes


def detect_format(
    files: TensorFiles,
    module: str,
    bits: int,
    stored: NDArray[np.uint8],
    groups: NDArray[np.int32],
) -> CheckpointFormat | None:
    """Detect from some codes of a matrix whether its zero points are stored minus one.

    Args:
        files: The files.
        module: The matrix.
        bits: Bits per code.
        stored: Shape (G, N), the zero points as they are stored.
        groups: Shape (K,), the group of each column.

    Returns:
        The format, or None if the weights do not lie evenly about either zero point.
    """
    qweight = files.raw(f"{module}.qweight")
    per_run = 3 if bits == 3 else 1  # words that hold whole codes
    runs = max(1, _CODES // (codes_per_unit(bits) * qweight.shape[1]))
    words = np.ascontiguousarray(qweight[: runs * per_run].T).view(np.uint32)
    codes = unpack_rows(words, bits)
    zeros = stored.T[:, groups[: codes.shape[1]]]
    # A group whose zero point is near an end of the range has its weights on one side.
    quarter = 1 << (bits - 2)
    centred = (zeros >= quarter) & (zeros < 3 * quarter)
    above = codes[centred].astype(np.int16) - zeros[centred]
    if not above.size:
        return None
    lopsided = [abs(float((above > at).mean() - (above < at).mean())) for at in (0, 1)]
    as_stored, less_one = lopsided
    noise = 4 / np.sqrt(above.size)
    if min(lopsided) + noise > 0.5 * max(lopsided):
        return None
    return "gptq_v2" if as_stored < less_one else "gptq"


def _finite(files: TensorFiles, name: str) -> bool:
    raw = files.raw(name)
    if files.dtype(name) == "bfloat16":
        return not ((raw & np.uint16(0x7F80)) == 0x7F80).any()
    return bool(np.isfinite(raw).all())


def _missing_tables(layout: GptqFormat, modules: Sequence[str], tied: bool) -> list[str]:
    shared = tied and EMBEDDING in modules
    wrong = []
    if layout.head and HEAD not in modules and not shared:
        wrong.append("config.json says that lm_head is quantized, but it is not stored as codes")
    if layout.embedding and EMBEDDING not in modules:
        wrong.append("config.json says that the embedding is quantized, but it has no codes")
    return wrong


def _two_configs(folder: Path, config: dict[str, Any]) -> list[str]:
    """Differences between quantize_config.json, which AutoGPTQ reads, and config.json."""
    if not (folder / AUTO_GPTQ_CONFIG).is_file():
        return []
    ours, other = config["quantization_config"], read_json(folder / AUTO_GPTQ_CONFIG)
    return [
        f"config.json says {name} {ours[name]!r}, but {AUTO_GPTQ_CONFIG} says {other[name]!r}"
        for name in ("bits", "group_size", "sym", "desc_act", "checkpoint_format")
        if name in ours and name in other and ours[name] != other[name]
    ]


def _few(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{rest}"
