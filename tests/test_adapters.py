"""Ways to fine-tune an encoder: equal to an independent form, through training, record, resume and predict."""
import pytest
import torch
import torch.nn.functional as F

from finessl.backbone import Encoder, load_backbone
from finessl.checks import tiny_encoder
from finessl.data import digits
from finessl.engine.adapters import FineTuned, qkv_matrix
from finessl.engine.peft_names import SIZES, VIT_PEFT
from finessl.engine.runs import load_run
from finessl.peft import build_model, trainable_state_dict
from finessl.pseudo_labels import FixMatch
from finessl.training import fit

FEW = dict(steps=4, batch=4, evals=2, progress=False, checkpoint_every=1, device="cpu")


@pytest.fixture(scope="module")
def ds():
    ds = digits(1, 0)
    return ds._replace(x_ulb=ds.x_ulb[:100], y_ulb=ds.y_ulb[:100], x_test=ds.x_test[:20], y_test=ds.y_test[:20],
                       split=ds.split._replace(idx_lb=torch.zeros(0, dtype=torch.int64)))


def make(encoder, name, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FineTuned(encoder, name)


def stir(model, std=.05):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(std * torch.randn(p.shape, generator=g))
    return model


def images(encoder, n=3):
    return torch.randn(n, 3, *[encoder.image_size] * 2, generator=torch.Generator().manual_seed(0))


def test_lora_equals_the_library_peft():
    "Where it is installed (`pip install peft`): rank 2r on the whole matrix, a block for each of query and value."
    peft, timm = pytest.importorskip("peft"), pytest.importorskip("timm")
    torch.manual_seed(0)
    tiny = dict(img_size=32, patch_size=8, depth=3, num_classes=0)
    vit = timm.create_model("vit_tiny_patch16_224", **tiny).eval()
    ours = stir(make(Encoder(vit, "timm"), "lora:2"))
    x, D, r = images(ours.encoder), vit.embed_dim, 2
    config = peft.LoraConfig(r=2 * r, lora_alpha=2 * r, target_modules=["qkv"], lora_dropout=0.)
    theirs = peft.get_peft_model(timm.create_model("vit_tiny_patch16_224", **tiny), config).eval()
    state = theirs.state_dict()
    for k, v in vit.state_dict().items():
        name = f"base_model.model.{k.replace('.qkv.', '.qkv.base_layer.')}"
        assert name in state, name
        state[name] = v
    for i, block in enumerate(ours.encoder.blocks):
        module, name = qkv_matrix(block.module.attn)
        low, at = module.parametrizations[name][0], f"base_model.model.blocks.{i}.attn.qkv.lora_"
        state[f"{at}A.default.weight"] = low.down.detach().flatten(0, 1)
        b = torch.zeros(3 * D, 2 * r)
        b[:D, :r], b[2 * D:, r:] = low.up.detach()
        state[f"{at}B.default.weight"] = b
    theirs.load_state_dict(state)
    features = theirs.base_model.model.forward_features(x)[:, 0]
    assert (ours(x) - features).abs().max() < 1e-5
    ours(x).square().sum().backward(); theirs.base_model.model.forward_features(x)[:, 0].square().sum().backward()
    low = ours.encoder.blocks[1].module.attn.qkv.parametrizations["weight"][0]
    theirs_b = theirs.get_parameter("base_model.model.blocks.1.attn.qkv.lora_B.default.weight").grad
    assert torch.allclose(low.up.grad[0], theirs_b[:D, :r], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["timm", "open_clip"])
def test_scales_equal_layers_with_hooks(kind):
    "The plain form: every layer's output times γ plus β, by hooks on modules that are called."
    encoder = tiny_encoder(kind)
    ours = stir(make(encoder, "ssf"), .1)
    by_name = dict(ours.encoder.model.named_modules())
    def hook(name):
        m = by_name[name]
        scale, shift = m.parametrizations["weight"][0].scale, m.parametrizations["bias"][0].shift
        def after(module, args, out): # a convolution has its channels in front
            wide = (slice(None), None, None) if isinstance(module, torch.nn.Conv2d) else ()
            return out * scale[wide] + shift[wide]
        return after
    plain = tiny_encoder(kind)
    plain.load_state_dict(encoder.state_dict())
    silent = [] # layers of nn.MultiheadAttention, which reads their weights and calls none of them
    for name, module in plain.model.named_modules():
        kinds = getattr(by_name[name], "parametrizations", {})
        if "in_proj_weight" in kinds: silent.append((module, "in_proj_weight", "in_proj_bias", kinds))
        elif kinds and kind == "open_clip" and name.endswith("out_proj"):
            silent.append((module, "weight", "bias", kinds))
        elif kinds: module.register_forward_hook(hook(name))
    assert bool(silent) == (kind == "open_clip")
    for module, weight, bias, kinds in silent:
        with torch.no_grad():
            getattr(module, weight).mul_(kinds[weight][0].scale[:, None])
            getattr(module, bias).mul_(kinds[weight][0].scale).add_(kinds[bias][0].shift)
    x = images(encoder)
    with torch.no_grad():
        h = plain.tokens(x)
        for block in plain.blocks: h = block.module(h) # the library's own forward pass, hooks included
        assert (ours(x) - plain.norm(h[:, 0])).abs().max() < 1e-4
        assert (ours(x) - encoder(x)).abs().max() > .01


@pytest.mark.parametrize("kind", ["timm", "open_clip"])
def test_adaptformer_and_adapter_as_written(kind):
    "Block by block, in the papers' words, with the library's own parts."
    encoder, x = tiny_encoder(kind), None
    for name in ("adapter:5", "adaptformer:5"):
        ours, x = stir(make(encoder, name)), images(encoder)
        bottlenecks = list(ours.encoder.bottlenecks)
        def run(b, y, act): return F.linear(act(F.linear(y, b.down.weight, b.down.bias)), b.up.weight, b.up.bias)
        with torch.no_grad():
            h = encoder.tokens(x)
            for block in encoder.blocks:
                a = block.attend(*block.qkv(block.norm1(h)))
                if name.startswith("adapter:"): a = a + run(bottlenecks.pop(0), a, F.gelu)
                h = h + a
                m, y = block.feed(h), block.norm2(h)
                m = m + run(bottlenecks.pop(0), m, F.gelu) if name.startswith("adapter:") else \
                    m + .1 * run(bottlenecks.pop(0), y, F.relu)
                h = h + m
            assert not bottlenecks and (ours(x) - encoder.norm(h[:, 0])).abs().max() < 1e-5


def test_what_is_trained():
    encoder = load_backbone("pocket")
    trained = {name: set(trainable_state_dict(make(encoder, name))) for name in SIZES if name in VIT_PEFT}
    assert trained["bitfit"] and all(k.endswith("bias") for k in trained["bitfit"])
    assert trained["bitfit"] < trained["full"] and trained["partial"] < trained["full"]
    assert all(".3." in k or "norm" in k or "ln_post" in k for k in trained["partial"]), trained["partial"]
    text = [k for k in trained["full"] if "text" in k or "token_embedding" in k]
    assert not text and not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("name", ["lora:2", "adapter:4", "adaptformer:4", "bitfit", "ssf", "partial", "full"])
def test_trained_saved_resumed_and_predicted(name, ds, tmp_path):
    encoder = load_backbone("pocket")
    before = encoder.hash
    whole = fit(ds, encoder, FixMatch(), peft=name, out=tmp_path / "whole", **FEW)
    assert encoder.hash == before and whole.record["peft"] == name
    again = load_run(tmp_path / "whole")
    assert torch.equal(again.predict(ds.x_test), whole.predict(ds.x_test))
    start = build_model(encoder, 10, name, seed=0)
    moved = [not torch.equal(v, trainable_state_dict(whole.model)[k]) for k, v in trainable_state_dict(start).items()]
    assert sum(moved) >= len(moved) - 4, f"{len(moved) - sum(moved)} of {len(moved)} never moved"


@pytest.mark.parametrize("name", ["lora:2", "full"])
def test_resume_is_bit_exact(name, ds, tmp_path):
    class Stop(FixMatch):
        def __call__(self, logits, state):
            self.calls.append(0)
            if len(self.calls) == 3: raise RuntimeError("cut")
            return super().__call__(logits, state)
    encoder = load_backbone("pocket")
    whole = fit(ds, encoder, FixMatch(), peft=name, out=tmp_path / "whole", **FEW)
    cut = Stop(); object.__setattr__(cut, "calls", [])
    Stop.__name__ = "FixMatch"
    with pytest.raises(RuntimeError, match="cut"): fit(ds, encoder, cut, peft=name, out=tmp_path / "run", **FEW)
    on = fit(ds, encoder, FixMatch(), peft=name, out=tmp_path / "run", resume=True, **FEW)
    a, b = trainable_state_dict(whole.model), trainable_state_dict(on.model)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [e["loss"] for e in whole.record["evaluations"]] == [e["loss"] for e in on.record["evaluations"]]


def test_wrong_names_say_what_is_possible(ds):
    for name, says in (("lara", "one of vpt, linear, lora"), ("bitfit:2", "no size"), ("lora:x", "whole number")):
        with pytest.raises(ValueError, match=says): fit(ds, "pocket", FixMatch(), peft=name, **FEW)
    with pytest.raises(ValueError, match="prompt_init"):
        fit(ds, "pocket", FixMatch(), peft="lora", prompt_init="tokens", **FEW)
