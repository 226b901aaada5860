"""Registers our merge methods in the stock `mergekit-yaml`.

mergekit 0.1.5 reads no entry points, but PyTorch loads the group `torch.backends` at the end of `import torch`, and
mergekit imports torch first. `register` therefore runs at every `import torch` on the machine: it must be cheap and
must never break torch. It only adds a finder to sys.meta_path. The finder waits for three mergekit modules and then
calls merging/in_mergekit/plugin.py. HF_CONTMERGE_AUTOLOAD=0 disables it.
"""

import os
import sys

# Not the package mergekit.merge_methods: imported before torch, it is already half executed when torch calls
# `register`. Its registry always comes after torch.
_HOOKS = {
    "mergekit.merge_methods.registry": "register_rules",
    "mergekit.plan": "guard_planner",
    "mergekit.merge": "guard_merge",
}


class _MergekitFinder:
    """Finds no modules itself; runs a plugin hook after each awaited module."""

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
                _run_hook(self.awaited.pop(name, None))
                if not self.awaited and self in sys.meta_path:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = exec_module
        return spec


def register():
    """Wait for mergekit; called by PyTorch, perhaps repeatedly."""
    if os.environ.get("HF_CONTMERGE_AUTOLOAD") == "0" or any(type(f) is _MergekitFinder for f in sys.meta_path):
        return
    awaited = dict(_HOOKS)
    for name in _HOOKS:
        if hasattr(sys.modules.get(name), "__file__") and _executed(sys.modules[name]):
            _run_hook(awaited.pop(name))
    if awaited:
        sys.meta_path.insert(0, _MergekitFinder(awaited))


def _executed(module):
    return not getattr(getattr(module, "__spec__", None), "_initializing", False)


def _run_hook(hook):
    """Run a plugin hook; log failures instead of raising."""
    if hook is None:
        return
    try:
        import hf_contmerge.merging.in_mergekit.plugin as plugin

        # Imported before mergekit, the plugin imports it now; it registers the rules at its own end.
        if hook != "register_rules" or hasattr(plugin, hook):
            getattr(plugin, hook)()
    except Exception:
        import logging

        logging.getLogger("hf_contmerge").exception("Cannot load hf_contmerge's merge methods into mergekit")
