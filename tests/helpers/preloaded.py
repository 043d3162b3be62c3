"""What a test's process needs and takes seconds to import. The fork server imports it once, see worlds.py."""

import mmrl.cli.training
import mmrl.evaluate.command
import mmrl.rotation.command
import mmrl.train.trainer  # noqa: F401
from mmrl.engine import engine

engine._import_deepspeed()
