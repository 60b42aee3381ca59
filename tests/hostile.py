"""A pickle that does something when it is loaded."""

import os


class Hostile:
    """Whoever unpickles it makes the folder `target`."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)
