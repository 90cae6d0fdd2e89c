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
    from quantize.auto_gptq_names import gptq_settings as gptq_settings
    from quantize.conversion import convert as convert
    from quantize.dequantization import dequantize as dequantize
    from quantize.folders import to_gptq as to_gptq
    from quantize.gptq import quantize_weight as quantize_weight
    from quantize.merging import merge_lora as merge_lora
    from quantize.mixed import to_mixed as to_mixed
    from quantize.mixed_settings import MixedSettings as MixedSettings
    from quantize.nf4 import to_nf4 as to_nf4
    from quantize.rotation import rotate as rotate
    from quantize.rotation_settings import RotationSettings as RotationSettings
    from quantize.rounding_folder import to_rounding as to_rounding
    from quantize.settings import GptqSettings as GptqSettings
    from quantize.settings import Nf4Settings as Nf4Settings
    from quantize.settings import RoundingSettings as RoundingSettings
    from quantize.sweep_settings import SweepSettings as SweepSettings
    from quantize.sweeping import sweep as sweep
    from quantize.tuning import tune as tune
    from quantize.tuning_settings import TuningSettings as TuningSettings

_HOMES = {
    "GptqSettings": "quantize.settings",
    "MixedSettings": "quantize.mixed_settings",
    "Nf4Settings": "quantize.settings",
    "RotationSettings": "quantize.rotation_settings",
    "RoundingSettings": "quantize.settings",
    "TuningSettings": "quantize.tuning_settings",
    "SweepSettings": "quantize.sweep_settings",
    "convert": "quantize.conversion",
    "dequantize": "quantize.dequantization",
    "gptq_settings": "quantize.auto_gptq_names",
    "merge_lora": "quantize.merging",
    "quantize_weight": "quantize.gptq",
    "rotate": "quantize.rotation",
    "sweep": "quantize.sweeping",
    "to_gptq": "quantize.folders",
    "to_mixed": "quantize.mixed",
    "to_nf4": "quantize.nf4",
    "to_rounding": "quantize.rounding_folder",
    "tune": "quantize.tuning",
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
