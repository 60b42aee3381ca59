"""The method: schedules, losses and the nine stages. Knows `dimo.ursa`; nothing of files, prompts or plots."""
