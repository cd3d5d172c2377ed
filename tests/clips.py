"A small CLIP that open_clip knows by name while a test uses it."
import contextlib, json
import open_clip, torch
from safetensors.torch import save_file


@contextlib.contextmanager
def small_clip(folder, name, vision): # -> the model, in evaluation mode; its file
    config = dict(embed_dim=24, vision_cfg=vision,
                  text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1))
    path, weights = folder / f"{name}.json", folder / "clip.safetensors"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    save_file(model.state_dict(), weights)
    try: yield model, weights
    finally:
        open_clip.factory._MODEL_CONFIG_PATHS.remove(path)
        open_clip.factory._MODEL_CONFIGS.pop(name)
