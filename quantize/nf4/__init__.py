"""bitsandbytes' 4-bit NormalFloat."""
