"""For the server's PYTHONPATH: lets PyPI's torchvision, which is built for CUDA, be imported beside a CPU torch.

Its compiled operators cannot be loaded there, and the import fails where it registers shapes for two of them. Declared
without a body they can be registered. Nothing that vLLM needs of torchvision (image transforms) calls them.
"""

import sys
from importlib.abc import MetaPathFinder
from typing import Any

OPERATORS = ("nms", "qnms")


class DeclareOperators(MetaPathFinder):
    """Acts just before torchvision is first imported, since torch is slow to import where it is not needed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")  # forgets its operators when it is let go
            for operator in OPERATORS:
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


declare = DeclareOperators()
sys.meta_path.insert(0, declare)
