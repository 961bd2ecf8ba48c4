"""A process that loads adapters where this package cannot be imported."""

LOAD = """
    import importlib.abc, json, sys
    class Blocked(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "hf_adapter_distillation":
                raise ImportError("blocked")
    sys.meta_path.insert(0, Blocked())
    import adapters, torch, transformers
    out, cases = json.loads(sys.argv[1])
    batch, logits = torch.load(out + "/batch.pt", weights_only=True), []
    for base, folder, static, setup, safe in cases:
        if static:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
            adapters.init(model)
        else:
            model = adapters.AutoAdapterModel.from_pretrained(base)
        if setup:
            model.load_adapter_setup(folder, set_active=True)
        else:
            model.set_active_adapters(model.load_adapter(folder, use_safetensors=safe))
        with torch.no_grad():
            logits.append(model.eval()(**batch).logits)
    torch.save(logits, out + "/logits.pt")
    assert not any(name.startswith("hf_adapter_distillation") for name in sys.modules)
"""
