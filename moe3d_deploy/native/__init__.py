"""The expert-mix kernel from Python: find and load its shared library, build it, and call it from PyTorch.

`loading` and `build` need neither torch nor a GPU; `torch_op` needs torch. Nothing heavy is imported here.
"""
