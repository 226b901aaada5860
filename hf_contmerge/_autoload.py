"""How the stock `mergekit-yaml` comes to know our merge methods.

mergekit 0.1.5 reads no entry points, but PyTorch loads those of the group `torch.backends` at the end of
`import torch`, and mergekit imports torch first. So `register` runs at every `import torch` on the machine: it must
cost next to nothing and must never break torch. It only puts a finder on sys.meta_path, which waits for three modules
of mergekit and then lets merging/in_mergekit/plugin.py do its part. HF_CONTMERGE_AUTOLOAD=0 turns it off.
"""

import os
import sys

# Not the package mergekit.merge_methods: whoever imports it before torch has it half executed when torch calls
# `register`, too late to wait for it. Its registry comes after torch either way.
_HOOKS = {
    "mergekit.merge_methods.registry": "register_rules",
    "mergekit.plan": "guard_planner",
    "mergekit.merge": "guard_merge",
}


class _MergekitFinder:
    """Finds no modules of its own; lets the plugin act once each awaited module has been executed."""

    def __init__(self, awaited):
        self.awaited = awaited

    def find_spec(self, name, path=None, target=None):
        if name not in self.awaited:
            return None
        others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        spec = next((s for f in others if (s := f.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _act(self.awaited.pop(name, None))
                if not self.awaited and self in sys.meta_path:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = exec_module
        return spec


def register():
    """Wait for mergekit. PyTorch calls this; twice does no harm."""
    if os.environ.get("HF_CONTMERGE_AUTOLOAD") == "0" or any(type(f) is _MergekitFinder for f in sys.meta_path):
        return
    awaited = dict(_HOOKS)
    for name in _HOOKS:
        if hasattr(sys.modules.get(name), "__file__") and _executed(sys.modules[name]):
            _act(awaited.pop(name))
    if awaited:
        sys.meta_path.insert(0, _MergekitFinder(awaited))


def _executed(module):
    return not getattr(getattr(module, "__spec__", None), "_initializing", False)


def _act(hook):
    """Call a function of the plugin. Whatever fails in there is ours: mergekit and torch must go on without us."""
    if hook is None:
        return
    try:
        import hf_contmerge.merging.in_mergekit.plugin as plugin

        getattr(plugin, hook)()
    except Exception:
        import logging

        logging.getLogger("hf_contmerge").exception("hf_contmerge's merge methods could not be loaded into mergekit")
