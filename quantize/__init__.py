"""A smaller copy of a model folder.

``to_gptq`` quantizes to 2, 3, 4 or 8 bits with calibration text, ``to_rounding`` without,
``to_nf4`` to bitsandbytes' NormalFloat, ``to_mixed`` with bits and groups chosen for every matrix
within a size. ``convert`` changes between the two formats of GPTQ
folders, ``dequantize`` goes back to floats, ``sweep`` tries many ways and measures
each. ``merge_lora`` puts an adapter into its base.
``gptq_settings`` reads AutoGPTQ's settings. ``quantize_weight`` is GPTQ itself: tensors in, codes
out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from quantize.conversions.conversion import convert as convert
    from quantize.conversions.dequantization import dequantize as dequantize
    from quantize.conversions.merging import merge_lora as merge_lora
    from quantize.folders.auto_gptq_names import gptq_settings as gptq_settings
    from quantize.folders.gptq_folder import to_gptq as to_gptq
    from quantize.folders.rounding_folder import to_rounding as to_rounding
    from quantize.gptq.gptq import quantize_weight as quantize_weight
    from quantize.mixed.mixed_folder import to_mixed as to_mixed
    from quantize.nf4.nf4_folder import to_nf4 as to_nf4
    from quantize.rotation.rotated_folder import rotate as rotate
    from quantize.scales.tuned_folder import tune as tune
    from quantize.settings import GptqSettings as GptqSettings
    from quantize.settings import MixedSettings as MixedSettings
    from quantize.settings import Nf4Settings as Nf4Settings
    from quantize.settings import RotationSettings as RotationSettings
    from quantize.settings import RoundingSettings as RoundingSettings
    from quantize.settings import SweepSettings as SweepSettings
    from quantize.settings import TuningSettings as TuningSettings
    from quantize.sweeping.sweeping import sweep as sweep

_HOMES = {
    "GptqSettings": "quantize.settings",
    "MixedSettings": "quantize.settings",
    "Nf4Settings": "quantize.settings",
    "RotationSettings": "quantize.settings",
    "RoundingSettings": "quantize.settings",
    "TuningSettings": "quantize.settings",
    "SweepSettings": "quantize.settings",
    "convert": "quantize.conversions.conversion",
    "dequantize": "quantize.conversions.dequantization",
    "gptq_settings": "quantize.folders.auto_gptq_names",
    "merge_lora": "quantize.conversions.merging",
    "quantize_weight": "quantize.gptq.gptq",
    "rotate": "quantize.rotation.rotated_folder",
    "sweep": "quantize.sweeping.sweeping",
    "to_gptq": "quantize.folders.gptq_folder",
    "to_mixed": "quantize.mixed.mixed_folder",
    "to_nf4": "quantize.nf4.nf4_folder",
    "to_rounding": "quantize.folders.rounding_folder",
    "tune": "quantize.scales.tuned_folder",
}

__all__ = [
    "GptqSettings",
    "MixedSettings",
    "Nf4Settings",
    "RotationSettings",
    "RoundingSettings",
    "SweepSettings",
    "TuningSettings",
    "convert",
    "dequantize",
    "gptq_settings",
    "merge_lora",
    "quantize_weight",
    "rotate",
    "sweep",
    "to_gptq",
    "to_mixed",
    "to_nf4",
    "to_rounding",
    "tune",
]
__getattr__ = lazy_exports(__name__, _HOMES)
