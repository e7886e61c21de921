"""The denoising steps of the sampler, which several budgets of the action head refer to; no torch."""

from dataclasses import dataclass

from evla_compile.settings.schedule import DDIM_STEPS, check_ddim_steps
from evla_compile.settings.setting import Settings, setting


@dataclass(frozen=True, kw_only=True)
class DenoisingSettings(Settings):
    """The steps of DDIM."""

    ddim_steps: int = setting(DDIM_STEPS, text="Denoising steps.", read=lambda _, steps: check_ddim_steps(steps))
    """Denoising steps of the DDIM sampler (eta 0); only counts that an integer stride over 100 yields."""

    @property
    def denoising_steps(self) -> int:
        """Denoising steps of the compiled sampler."""
        return self.ddim_steps
