"""The distillation method: schedules, losses and the nine stages. Depends on `dimo.ursa`, not on files or plots."""
