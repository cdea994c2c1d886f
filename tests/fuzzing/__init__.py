"""What reads files of strangers, under damaged ones.

A reader may raise nothing but its own errors, which name the file; may take no more
memory than ten times the file and 500 MB; and may not hang. The short form is in
tests/test_fuzzing.py, the long one is `python -m tests.fuzzing READER`.
"""

from . import images, weights

READERS = {**weights.READERS, **images.READERS}
