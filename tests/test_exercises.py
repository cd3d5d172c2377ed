"""The exercises are fair: a stub fails its check, the solution passes, and so do other right answers; wrong ones that
students write are rejected. Of every coding exercise at least three right variants and five wrong ones."""
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import finessl.checks.margin as check_margin
from finessl.algorithms import finessl_loss
from finessl.anchored import agreement_weights
from finessl.backbone import naive_attention
from finessl.bias import auroc, calibration_error
from finessl.course import runner
from finessl.course.exercises import code_of, exported_module, find_sources, is_imports, read_mark, read_notebook
from finessl.course.grade import Limits, defined_names, make_job
from finessl.data import batch_indices, generator, split_labels
from finessl.engine.processes import shard_views
from finessl.lab import zero_shot_logits
from finessl.labelling import typicality
from finessl.margin import balanced_margin_loss, class_margins
from finessl.peft import add_prompts
from finessl.reweighting import confidence_weights
from finessl.rivals import gaussian_weights
from finessl.smoothing import smooth_targets
from finessl.views import affine_theta, cutout

root = Path(__file__).resolve().parent.parent
sources = find_sources(root / "nbs")
exercises = {e.number: (path, e) for path, es in sources.items() for e in es}
CODE = [n for n, (_, e) in exercises.items() if e.kind == "code"]
RUN = [n for n, (_, e) in exercises.items() if e.kind != "explain"]
_bases = {}


def base(path, whole=True): # the names that an exercise may take as given; whole: with those of its notebook's module
    if (path, whole) not in _bases:
        names, nb = {"__name__": "__main__"}, read_notebook(Path(path))
        for c in nb["cells"]:
            if c["cell_type"] == "code" and is_imports(c) and read_mark(c) is None: exec(code_of(c), names)
        module = __import__(exported_module(nb), fromlist=["*"]) if whole else None
        _bases[path, whole] = names | ({k: v for k, v in vars(module).items() if k[0] != "_"} if whole else {})
    return dict(_bases[path, whole])


def check(number, source="", bonus=False, **names): # the reason, or "" where the check passes
    path, e = exercises[number]
    space = base(path)
    exec(source, space)
    mine = {n: space.get(n) for n in defined_names(e.stub)} | names
    try: exec(e.bonus_check if bonus else e.check, base(path) | mine)
    except Exception as error: return str(error) or type(error).__name__
    return ""


# right variants, by exercise: vectorised, a loop, another library
def margins_loop(counts, alpha=8., form="code"):
    counts = [float(c) for c in counts]
    beta = [c / (max(counts) or 1) for c in counts]
    scale = alpha * (max(beta) - min(beta))
    return torch.tensor([scale * (1 - b) / (1 if form == "paper" else 1 + b) for b in beta])

def margins_numpy(counts, alpha=8., form="code"):
    c = np.asarray(counts, dtype=float)
    b = c / c.max() if c.max() else np.ones_like(c)
    return alpha * np.ptp(b) * (1 - b) / (1 + (b if form == "code" else 0))

def margins_double(counts, alpha=8., form="code"):
    beta = counts.double() / counts.max().clamp(min=1)
    return alpha * (1 - beta.min()) * (1 - beta) / (1 + beta * (form == "code")) * (counts.max() > 0)

def reduced(loss, reduction): return {"none": loss, "sum": loss.sum(), "mean": loss.mean()}[reduction]

def loss_loop(z, y, margins, reduction="mean"):
    rows = []
    for row, t in zip(z, y.tolist()):
        raised = torch.stack([row[k] + (0 if k == t else float(margins[t])) for k in range(len(row))])
        rows.append(raised.logsumexp(0) - row[t])
    return reduced(torch.stack(rows), reduction)

def loss_softplus(z, y, margins, reduction="mean"):
    others = z.masked_fill(F.one_hot(y, z.shape[1]).bool(), -torch.inf).logsumexp(1)
    return reduced(F.softplus(others + margins.detach()[y] - z.gather(1, y[:, None])[:, 0]), reduction)

def loss_clone(z, y, margins, reduction="mean"):
    raised = z + margins.detach()[y][:, None]
    raised = raised.scatter(1, y[:, None], z.gather(1, y[:, None]))
    return F.nll_loss(raised.log_softmax(1), y, reduction=reduction)

def targets_loop(y, n_classes, lam=.5, form="code"):
    on, off = (1 - lam + lam / n_classes, lam / n_classes) if form == "paper" else (1 - lam, lam / (n_classes - 1))
    return torch.tensor([[on if k == t else off for k in range(n_classes)] for t in y.tolist()])

def targets_numpy(y, n_classes, lam=.5, form="code"):
    eye = np.eye(n_classes)[np.asarray(y)]
    return eye * (1 - lam) + (lam / n_classes if form == "paper" else (1 - eye) * lam / (n_classes - 1))

def targets_scatter(y, n_classes, lam=.5, form="code"):
    if form == "paper": lam = lam * (n_classes - 1) / n_classes
    return torch.full((len(y), n_classes), lam / (n_classes - 1)).scatter_(1, y[:, None], 1 - lam)

def aux_index(feat, w, pl, mask, lam=.5):
    if not mask.any(): return (w * 0).sum()
    return F.cross_entropy(feat.detach()[mask] @ w.T, smooth_targets(pl[mask], len(w), lam))

def aux_loop(feat, w, pl, mask, lam=.5):
    total, n = w.sum() * 0, 0
    for x, t, keep in zip(feat.detach(), pl.tolist(), mask.tolist()):
        if not keep: continue
        lp = (w @ x).log_softmax(0)
        total = total - (1 - lam) * lp[t] - lam / (len(w) - 1) * (lp.sum() - lp[t])
        n += 1
    return total / max(n, 1)

def aux_einsum(feat, w, pl, mask, lam=.5):
    lp = torch.einsum("ud,cd->uc", feat.detach(), w).log_softmax(-1)
    loss = -(smooth_targets(pl, len(w), lam) * lp).sum(-1)
    return torch.where(mask, loss, 0.).sum() / max(int(mask.sum()), 1)

def weights_loop(a_ulb_w, gamma=3.):
    return torch.tensor([gamma / sum(np.exp(v - max(r)) for v in r) for r in a_ulb_w.tolist()])

def weights_numpy(a_ulb_w, gamma=3.):
    from scipy.special import softmax
    return gamma * softmax(a_ulb_w.detach().numpy(), axis=1).max(1)

@torch.no_grad()
def weights_no_grad(a_ulb_w, gamma=3.): return gamma * F.softmax(a_ulb_w, -1).max(-1).values


def kept_mean(z, pl, keep, weight): return weight * (F.cross_entropy(z, pl, reduction="none") * keep).mean()

def fixmatch_loop(z_lb, y_lb, z_ulb_w, z_ulb_s, tau=.7, weight=1.):
    p, total = z_ulb_w.detach().softmax(1), 0 * z_ulb_s.sum()
    for i, row in enumerate(z_ulb_s):
        q = p[i % len(p)]
        if q.max() >= tau: total = total - row.log_softmax(0)[q.argmax()]
    return F.cross_entropy(z_lb, y_lb) + weight * total / len(z_ulb_s)

def fixmatch_views(z_lb, y_lb, z_ulb_w, z_ulb_s, tau=.7, weight=1.):
    conf, pl = z_ulb_w.detach().softmax(1).max(1)
    views = z_ulb_s.reshape(-1, *z_ulb_w.shape)
    return F.cross_entropy(z_lb, y_lb) + sum(kept_mean(v, pl, conf >= tau, weight) for v in views) / len(views)

def fixmatch_gather(z_lb, y_lb, z_ulb_w, z_ulb_s, tau=.7, weight=1.):
    with torch.no_grad(): p = torch.exp(z_ulb_w - z_ulb_w.logsumexp(1, keepdim=True))
    n = len(z_ulb_s) // len(p)
    lp = z_ulb_s.log_softmax(-1).gather(1, p.argmax(1).repeat(n)[:, None])[:, 0]
    return F.nll_loss(z_lb.log_softmax(1), y_lb) - weight * torch.where((p.amax(1) >= tau).repeat(n), lp, 0.).mean()

def wrong_fixmatch(logits=lambda w: w.detach().softmax(1), keep=lambda c, tau: c >= tau,
                   spread=lambda t, n: t.repeat(n), mean=lambda l, m: (l * m).mean()):
    def wrong(z_lb, y_lb, z_ulb_w, z_ulb_s, tau=.7, weight=1.):
        p, n = logits(z_ulb_w), len(z_ulb_s) // len(z_ulb_w)
        mask = keep(p.amax(1), tau)
        loss = F.cross_entropy(z_ulb_s, spread(p.argmax(1), n), reduction="none")
        return F.cross_entropy(z_lb, y_lb) + weight * mean(loss, spread(mask, n).float())
    return wrong


def finessl_given(*args): return finessl_loss(*args)[0]

def finessl_loop(z_lb, y_lb, z_w, z_s, a_lb, a_w, a_s, margins, zeta=.7, lam=.5, gamma=3.):
    C, total, kept = z_lb.shape[1], 0, []
    bms = lambda z, y: torch.stack([z[k] + (0 if k == y else margins[y]) for k in range(C)]).logsumexp(0) - z[y]
    for i, (z, a) in enumerate(zip(z_s, a_s)):
        q, psi = z_w[i % len(z_w)].detach().softmax(0), a_w[i % len(z_w)].detach().softmax(0).max()
        y, lp = int(q.argmax()), a.log_softmax(0)
        total = total + gamma * psi * bms(z, y) / len(z_s)
        if q.max() >= zeta: kept.append(-(1 - lam) * lp[y] - lam / (C - 1) * (lp.sum() - lp[y]))
    lb = sum(bms(z, int(y)) for z, y in zip(z_lb, y_lb)) / len(y_lb) + F.cross_entropy(a_lb, y_lb)
    return lb + total + (sum(kept) / len(kept) if kept else 0)

def finessl_views(z_lb, y_lb, z_w, z_s, a_lb, a_w, a_s, margins, zeta=.7, lam=.5, gamma=3., cut=True, aux_mean=None,
                  psi=lambda z, a: a, on=smooth_targets, spread=lambda t, V: t.repeat(V), plain=True, keep=torch.ge):
    q, V = (z_w.detach() if cut else z_w).softmax(1), len(z_s) // len(z_w)
    weights = spread(psi(q, (a_w.detach() if cut else a_w).softmax(1)).amax(1), V)
    (conf, pl), C = q.max(1), z_lb.shape[1]
    pl, mask = spread(pl, V), spread(keep(conf, zeta), V)
    aux = F.cross_entropy(a_s, on(pl, C, lam), reduction="none")
    aux = aux_mean(aux, mask) if aux_mean else torch.where(mask, aux, 0.).sum() / max(int(mask.sum()), 1)
    lb = F.cross_entropy(a_lb, y_lb if plain else smooth_targets(y_lb, C, lam))
    main = weights * balanced_margin_loss(z_s, pl, margins, "none")
    return balanced_margin_loss(z_lb, y_lb, margins) + lb + gamma * main.mean() + aux

def wrong_finessl(**change): return lambda *args: finessl_views(*args, **change)


RIGHT = {
    "8.2": [finessl_given, finessl_loop, finessl_views],
    "3.2": [fixmatch_loop, fixmatch_views, fixmatch_gather],
    "0.1": [lambda z, y: sum(int(r.max() == r[t]) for r, t in zip(z, y)) / len(y),
            lambda z, y: (z.max(1).indices == y).double().mean(),
            lambda z, y: float(np.mean(z.numpy().argsort(1)[:, -1] == y.numpy()))],
    "5.2": [margins_loop, margins_numpy, margins_double],
    "5.3": [loss_loop, loss_softplus, loss_clone],
    "6.2": [targets_loop, targets_numpy, targets_scatter],
    "6.3": [aux_index, aux_loop, aux_einsum],
    "7.2": [weights_loop, weights_numpy, weights_no_grad],
    "7.3": [lambda w: sum(w.tolist()) ** 2 / sum(v * v for v in w.tolist()),
            lambda w: 1 / ((w / w.sum()) ** 2).sum(), lambda w: w.numpy().sum() ** 2 / np.dot(w.numpy(), w.numpy()),
            lambda w: len(w) * w.mean() ** 2 / (w ** 2).mean()],
}


def adjusted(change): # a margin loss of other logits
    def wrong(z, y, margins, reduction="mean"):
        return F.cross_entropy(change(z, F.one_hot(y, z.shape[1]), margins.detach(), y), y, reduction=reduction)
    return wrong

def wrong_aux(logits=lambda f, w: f.detach() @ w.T, targets=smooth_targets, mean=None):
    def wrong(feat, w, pl, mask, lam=.5):
        loss = F.cross_entropy(logits(feat, w), targets(pl, len(w), lam), reduction="none")
        return mean(loss, mask) if mean else (loss * mask).sum() / mask.sum().clamp(min=1)
    return wrong


WRONG = {
    "8.2": [wrong_finessl(cut=False),                                         # missing detach
            wrong_finessl(aux_mean=lambda l, m: (l * m).mean()),              # batch mean for the kept ones'
            wrong_finessl(aux_mean=lambda l, m: l.mean()),                    # mask forgotten
            wrong_finessl(psi=lambda z, a: z),                                # the main head's confidence
            wrong_finessl(psi=lambda z, a: torch.ones_like(a)),               # no weights
            wrong_finessl(on=lambda y, C, lam: smooth_targets(y, C, lam, "paper")),
            wrong_finessl(on=lambda y, C, lam: smooth_targets(y, C, 0.)),     # no smoothing
            wrong_finessl(spread=lambda t, V: t.repeat_interleave(V)),        # image-major
            wrong_finessl(plain=False),                                       # the paper's labelled loss
            wrong_finessl(keep=torch.gt),                                     # ζ itself is left out
            wrong_finessl(on=lambda y, C, lam: smooth_targets(y, 2, lam)),    # always two classes
            wrong_finessl(on=lambda y, C, lam: torch.where(F.one_hot(y, C) == 1, 1 - lam, lam)),
            lambda *args: finessl_views(*args) + balanced_margin_loss(args[0], args[1], args[7]), # labelled losses,
            lambda *args: finessl_views(*args) + F.cross_entropy(args[4], args[1]),               # summed
            lambda *args: finessl_views(*args).item(),                        # no gradient left
            lambda *args: finessl_views(*args[:7], -args[7], *args[8:]),      # sign of the margin
            lambda *args: finessl_views(*args[:7], args[7].flip(0), *args[8:])], # another class's margin
    "3.2": [wrong_fixmatch(mean=lambda l, m: (l * m).sum() / m.sum().clamp(min=1)),      # mean over the kept
            wrong_fixmatch(logits=lambda w: w.softmax(1), keep=lambda c, tau: c * (c >= tau)), # a weight, with gradient
            wrong_fixmatch(logits=lambda w: w.detach()),                      # logits for probabilities
            wrong_fixmatch(spread=lambda t, n: t.repeat_interleave(n)),       # image-major
            wrong_fixmatch(keep=lambda c, tau: c > tau),                      # τ itself is left out
            wrong_fixmatch(keep=lambda c, tau: c <= tau),                     # sign
            wrong_fixmatch(logits=lambda w: w.detach().softmax(0)),           # wrong axis
            wrong_fixmatch(mean=lambda l, m: l.mean()),                       # no threshold
            lambda z, y, *rest: fixmatch_views(z, y, *rest) + F.cross_entropy(z, y), # labelled losses, summed
            lambda *args: fixmatch_views(*args).item(),                       # no gradient left
            lambda z, y, w, s, tau=.7, weight=1.: weight * fixmatch_views(z, y, w, s, tau, 1.)], # on both losses
    "0.1": [lambda z, y: (z.argmax(1) == y[:, None]).float().mean(),          # broadcasting
            lambda z, y: (z.argmax(1) == y).float().sum(),                    # a count
            lambda z, y: (z.argmin(1) == y).float().mean(),                   # sign
            lambda z, y: (z.amax(0)[y] == z.amax(1)).float().mean(),          # wrong axis
            lambda z, y: (z.gather(1, y[:, None])[:, 0] > 0).float().mean()], # a threshold
    "5.2": [lambda c, alpha=8., form="code": class_margins(c, alpha, "paper"),
            lambda c, alpha=8., form="code": class_margins(c.max() - c, alpha, form),        # the frequent favoured
            lambda c, alpha=8., form="code": alpha * (1 - (b := c / c.max().clamp(min=1))) / (1 + b * (form == "code")),
            lambda c, alpha=8., form="code": class_margins(c, alpha, form) * c.max() / c.sum().clamp(min=1), # shares
            lambda c, alpha=8., form="code": class_margins(c, alpha, form) + c / c.max(),    # 0/0 at the start
            lambda c, alpha=8., form="code": -class_margins(c, alpha, form)],                # sign
    "5.3": [adjusted(lambda z, o, m, y: z + m * o),                           # margin on the target
            adjusted(lambda z, o, m, y: z - m[y, None] * (1 - o)),            # sign
            adjusted(lambda z, o, m, y: z + m * (1 - o)),                     # each class its own margin
            adjusted(lambda z, o, m, y: z + m[y, None]),                      # on all: cancels
            adjusted(lambda z, o, m, y: z + m.roll(1)[y, None] * (1 - o)),    # off-by-one class
            lambda z, y, m, reduction="mean": F.cross_entropy(z - m[y, None] * F.one_hot(y, z.shape[1]), y,
                                                              reduction=reduction),          # missing detach
            lambda z, y, m, reduction="mean": balanced_margin_loss(z.softmax(1), y, m, reduction), # probabilities
            lambda z, y, m, reduction="mean": balanced_margin_loss(z, y, m),  # the mean for every reduction
            lambda z, y, m, reduction="mean": F.cross_entropy(z.sub_(m.detach()[y, None] * F.one_hot(y, z.shape[1])), y,
                                                              reduction=reduction)],         # in place
    "6.2": [lambda y, n, lam=.5, form="code": smooth_targets(y, n, lam, "paper"),
            lambda y, n, lam=.5, form="code": smooth_targets(y, n, lam, "code"),
            lambda y, n, lam=.5, form="code": smooth_targets(y, n, 1 - lam, form),           # λ on the label
            lambda y, n, lam=.5, form="code": F.one_hot(y, n) * (1 - lam) + lam / n,         # one formula for both
            lambda y, n, lam=.5, form="code": smooth_targets(y, n, lam, form).T,             # wrong axis
            lambda y, n, lam=.5, form="code": smooth_targets((y + 1) % n, n, lam, form)],    # off-by-one class
    "6.3": [wrong_aux(lambda f, w: f @ w.T),                                  # missing detach
            wrong_aux(lambda f, w: f.detach() @ w.detach().T + 0 * w.sum()),  # the head does not learn
            wrong_aux(lambda f, w: f.detach() @ w.detach().T),                # nothing learns
            wrong_aux(mean=lambda l, m: (l * m).mean()),                      # batch mean
            wrong_aux(mean=lambda l, m: l.mean()),                            # mask forgotten
            wrong_aux(mean=lambda l, m: l[m].mean()),                         # NaN where none is kept
            wrong_aux(lambda f, w: (f.detach() @ w.T).softmax(1)),            # probabilities for logits
            wrong_aux(targets=lambda pl, n, lam: smooth_targets(pl, n, lam, "paper")),
            wrong_aux(targets=lambda pl, n, lam: smooth_targets(pl, n, 0.))], # no smoothing
    "7.2": [lambda a, gamma=3.: gamma * a.softmax(1).amax(1),                 # missing detach
            lambda a, gamma=3.: gamma * a.detach().softmax(0).amax(1),        # wrong axis
            lambda a, gamma=3.: gamma * a.detach().amax(1),                   # logits for probabilities
            lambda a, gamma=3.: a.detach().softmax(1).amax(1),                # without γ
            lambda a, gamma=3.: gamma * (c := confidence_weights(a, 1.)) / c.mean(),         # over the batch's mean
            lambda a, gamma=3.: gamma * confidence_weights(a, 1.) * (confidence_weights(a, 1.) >= .7),
            lambda a, gamma=3.: gamma * (e := a.detach().exp()).amax(1) / e.sum(1)],         # overflows
    "7.3": [lambda w: w.sum(), lambda w: (w > 0).sum().float(), lambda w: w.sum() / w.max(),
            lambda w: (w ** 2).sum() / w.sum() ** 2, lambda w: w.sum() ** 2 / w.sum().square().clamp(min=1),
            lambda w: w.sum() / (w ** 2).sum()],
}


# the ground: data, lab, bias, views, backbone, PEFT, training
def auroc_loop(a, b):
    return sum(1. if x > y else .5 if x == y else 0. for x in a.tolist() for y in b.tolist()) / (len(a) * len(b))

def auroc_ranks(a, b):
    from scipy.stats import rankdata
    return (rankdata(torch.cat([a, b]).numpy())[:len(a)].sum() - len(a) * (len(a) + 1) / 2) / (len(a) * len(b))

def auroc_search(a, b):
    ordered = b.sort().values.contiguous()
    return ((torch.searchsorted(ordered, a) + torch.searchsorted(ordered, a, right=True)) / 2 / len(b)).mean()

def ece_loop(conf, correct, bins=15):
    total = 0.
    for m in range(bins):
        inside = (conf > m / bins) & (conf <= (m + 1) / bins) | (conf == 0) & (m == 0)
        if inside.any():
            total += abs(conf[inside].mean() - correct[inside].float().mean()) * inside.sum() / len(conf)
    return total

def ece_numpy(conf, correct, bins=15):
    m = np.digitize(conf.numpy(), np.linspace(0, 1, bins + 1)[1:-1], right=True)
    return np.abs(np.bincount(m, conf.double().numpy() - correct.numpy(), bins)).sum() / len(conf)

def ece_one_hot(conf, correct, bins=15):
    m = torch.bucketize(conf, torch.linspace(0, 1, bins + 1)[1:-1])
    return (F.one_hot(m, bins).float().T @ (correct.float() - conf)).abs().sum() / len(conf)

def wrong_ece(weigh=lambda gap, n, N: (gap / n.clamp(min=1)).abs() * n / N, last=lambda x: x.sum(), lower=False):
    def wrong(conf, correct, bins=15):
        m = (conf * bins).long().clamp(max=bins - 1) if lower else ((conf * bins).ceil().long() - 1).clamp(min=0)
        n = m.bincount(minlength=bins)
        gap = torch.zeros(bins).index_add_(0, m, correct.float() - conf)
        return last(weigh(gap, n, len(conf))[n > 0])
    return wrong

def ece_without(end):
    return lambda c, right, bins=15: ece_loop(c[c != end], right[c != end], bins) * (c != end).float().mean()

def split_torch(y, n, seed):
    g = lambda c: torch.Generator().manual_seed(1000 * seed + c)
    rows = [(y == c).nonzero()[:, 0] for c in range(int(y.max()) + 1)]
    return torch.cat([r[torch.randperm(len(r), generator=g(c))[:n]] for c, r in enumerate(rows)])

def split_keys(y, n, seed):
    order = np.random.default_rng(seed).random(len(y)).argsort()
    return [i for c in range(int(y.max()) + 1) for i in [j for j in order.tolist() if y[j] == c][:n]]

def split_python(y, n, seed):
    import random
    out = []
    for c in sorted(set(y.tolist())):
        mine = [i for i, t in enumerate(y.tolist()) if t == c]
        random.Random(f"{seed}/{c}").shuffle(mine)
        out += mine[:n]
    return np.array(out)

def split_by(draw): # draw(positions of a class, n, seed, class)
    def split(y, n, seed):
        places = {c: (y == c).nonzero()[:, 0].numpy() for c in y.unique().tolist()}
        return torch.cat([torch.as_tensor(draw(mine, n, seed, c)) for c, mine in places.items()])
    return split

def global_numpy(mine, n, seed, c):
    np.random.seed(seed)
    return np.random.permutation(mine)[:n]

def class_batch_by(order): # order(n, seed, pass, class) -> (n,)
    def batch(y, seed, step):
        own = [(y == c).nonzero()[:, 0].tolist() for c in range(int(y.max()) + 1)]
        n = len(own[0])
        return [mine[int(order(n, seed, step // n, c)[step % n])] for c, mine in enumerate(own)]
    return batch

def class_batch_streams(y, seed, step):
    own = [(y == c).nonzero()[:, 0] for c in y.unique()]
    return torch.stack([mine[batch_indices(seed, step, len(mine), 1, 7 + c)[0]] for c, mine in enumerate(own)])

class View:
    def __init__(self, feat): self.feat = feat
    def sample_params(self, n, generator): return {"view": torch.randint(len(self.feat), (n,), generator=generator)}
    def __call__(self, x, params=None):
        return self.feat[params["view"] if params else torch.zeros_like(x), x]

class FlatView(View):
    def __call__(self, x, params=None):
        flat = self.feat.flatten(0, 1)
        return flat.index_select(0, x + (params["view"] * self.feat.shape[1] if params is not None else 0))

class LoopView(View):
    def sample_params(self, n, generator):
        return {"view": torch.tensor([int(torch.rand((), generator=generator) * len(self.feat)) for _ in range(n)])}
    def __call__(self, x, params=None):
        views = params["view"].tolist() if params else [0] * len(x)
        return torch.stack([self.feat[v, i] for v, i in zip(views, x.tolist())])

class MultinomialView(View):
    def sample_params(self, n, generator):
        even = torch.ones(len(self.feat))
        return {"view": torch.multinomial(even, n, replacement=True, generator=generator)}

class OneDraw(View):
    def sample_params(self, n, generator): return {"view": super().sample_params(1, generator)["view"].expand(n)}

class FrozenDraw(View):
    def sample_params(self, n, generator): return {"view": torch.arange(n) % len(self.feat)}

class GlobalDraw(View):
    def sample_params(self, n, generator): return {"view": torch.randint(len(self.feat), (n,))}

class LastNever(View):
    def sample_params(self, n, generator): return {"view": torch.randint(len(self.feat) - 1, (n,), generator=generator)}

class Pairwise(View):
    def sample_params(self, n, generator):
        return {"view": super().sample_params(-(-n // 2), generator)["view"].repeat_interleave(2)[:n]}

class MeanView(View):
    def __call__(self, x, params=None): return super().__call__(x, params) if params else self.feat.mean(0)[x]

class WholeView(View):
    def __call__(self, x, params=None): return self.feat[params["view"]][:, x] if params else self.feat[0, x]

class ViewZero(View):
    def __call__(self, x, params=None): return self.feat[0, x]

def cosines_loop(feat, text, scale=1.):
    length = lambda v: sum(x * x for x in v) ** .5
    return torch.tensor([[scale * sum(x * y for x, y in zip(a, b)) / length(a) / length(b) for b in text.tolist()]
                         for a in feat.tolist()])

def cosines_numpy(feat, text, scale=1.):
    a, b = feat.numpy(), text.numpy()
    return scale * (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T

def layer_plain(block, h, prompts):
    return block.module(torch.cat([h, prompts.expand(len(h), -1, -1)], 1))[:, :h.shape[1]]

def layer_front(block, h, prompts):
    return block.module(torch.cat([prompts.expand(len(h), -1, -1), h], 1))[:, len(prompts):]

def layer_added(block, h, prompts, slip=add_prompts, cut=lambda p: p, feed=True):
    q, k, v = block.qkv(block.norm1(h))
    h = h + block.attend(q, *slip(block, k, v, cut(prompts)))
    return h + block.feed(h) if feed else h

def prompts_without(norm):
    return lambda block, k, v, p: add_prompts(replace(block, **{norm: torch.nn.Identity()}), k, v, p)

def layer_loop(block, h, prompts):
    return torch.cat([block.module(torch.cat([x, prompts])[None])[:, :len(x)] for x in h])

def rows_loop(feat, y, n_classes):
    rows = []
    for k in range(n_classes):
        mean = sum(f / f.norm() for f, t in zip(feat, y.tolist()) if t == k)
        rows.append(mean / mean.norm())
    return torch.stack(rows)

def rows_means(feat, y, n_classes):
    feat = F.normalize(feat, dim=1)
    return F.normalize(torch.stack([feat[y == k].mean(0) for k in range(n_classes)]), dim=1)

def rows_numpy(feat, y, n_classes):
    f, out = feat.numpy() / np.linalg.norm(feat.numpy(), axis=1, keepdims=True), np.zeros((n_classes, feat.shape[1]))
    np.add.at(out, y.numpy(), f)
    return out / np.linalg.norm(out, axis=1, keepdims=True)

def cutout_loop(x, corner, edge, fill=127):
    out = x.clone()
    for i, (r, c) in enumerate(corner.tolist()):
        out[i, :, max(r, 0):max(r + edge, 0), max(c, 0):max(c + edge, 0)] = fill
    return out

def cutout_mask(x, corner, edge, fill=127):
    at = torch.stack(torch.meshgrid(torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing="ij"), -1)
    away = at[None] - corner[:, None, None]
    return x.masked_fill(((away >= 0) & (away < edge)).all(-1)[:, None], fill)

def cutout_padded(x, corner, edge, fill=127):
    padded = F.pad(x, (99, 99, 99, 99))
    for i, (r, c) in enumerate((corner + 99).tolist()): padded[i, :, r:r + edge, c:c + edge] = fill
    return padded[:, :, 99:-99, 99:-99]

def cutout_in_place(x, corner, edge, fill=127): return x.copy_(cutout_loop(x, corner, edge, fill))

def cutout_slices(x, corner, edge, fill=127): # negative indices count from the end
    out = x.clone()
    for i, (r, c) in enumerate(corner.tolist()): out[i, :, r:r + edge, c:c + edge] = fill
    return out

def theta_solve(rotate, shear, scale, shift, turn=1, order=lambda R, S: R @ S, inverse=True, shifted=True):
    out = []
    for phi, a, k, t in zip(rotate.double().deg2rad() * turn, shear.double(), scale.double(), shift.double()):
        R = (1 + k) * torch.stack([torch.stack([phi.cos(), phi.sin()]), torch.stack([-phi.sin(), phi.cos()])])
        S = torch.eye(2).double() - a * torch.tensor([[0., 1.], [0., 0.]]).double()
        m = torch.linalg.solve(order(R, S), torch.eye(2).double()) if inverse else order(R, S)
        out.append(torch.cat([m, -(m @ t if shifted else t)[:, None]], 1))
    return torch.stack(out)

def theta_numpy(rotate, shear, scale, shift):
    phi, a, k = np.radians(rotate.numpy()), shear.numpy(), 1 + scale.numpy()
    m = np.array([[np.cos(phi) + a * np.sin(phi), a * np.cos(phi) - np.sin(phi)], [np.sin(phi), np.cos(phi)]]) / k
    m = m.transpose(2, 0, 1)
    return np.concatenate([m, -(m @ shift.numpy()[:, :, None])], 2)

def attention_loop(q, k, v):
    return torch.stack([torch.stack([(a @ b.T / q.shape[-1] ** .5).softmax(1) @ c for a, b, c in zip(*heads)])
                        for heads in zip(q, k, v)])

def attention_numpy(q, k, v):
    s = (q @ k.transpose(2, 3)).numpy() / q.shape[-1] ** .5
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True) @ v.numpy()

def attention_by(scale=lambda q, k: q.shape[-1] ** -.5, axis=-1, soft=torch.softmax):
    return lambda q, k, v: soft(q @ k.transpose(2, 3) * scale(q, k), axis) @ v

def patches_loop(x, p):
    n = x.shape[-1] // p
    return torch.stack([torch.stack([im[:, r * p:r * p + p, c * p:c * p + p].flatten()
                                     for r in range(n) for c in range(n)]) for im in x])

def patches_view(x, p, axes=(0, 2, 4, 1, 3, 5)):
    n = x.shape[-1] // p
    return x.view(len(x), 3, n, p, n, p).permute(axes).reshape(len(x), n * n, 3 * p * p)

def update_numpy(p, grad, buffer, lr, momentum=.9, decay=0.):
    b = momentum * buffer.numpy() + grad.numpy() + decay * p.detach().numpy()
    return torch.from_numpy(p.detach().numpy() - np.float32(lr) * b.astype(np.float32)), torch.from_numpy(np.float32(b))

def update_torch(p, grad, buffer, lr, momentum=.9, decay=0.):
    leaf = torch.nn.Parameter(p.clone())
    sgd = torch.optim.SGD([leaf], lr=lr, momentum=momentum, weight_decay=decay)
    leaf.grad, sgd.state[leaf]["momentum_buffer"] = grad.clone(), buffer.clone()
    sgd.step()
    return leaf.detach(), buffer * momentum + grad + decay * p

def update_in_place(p, grad, buffer, lr, momentum=.9, decay=0.):
    buffer.mul_(momentum).add_(grad).add_(p, alpha=decay)
    return p.sub_(lr * buffer), buffer

def update_by(buffer=lambda b, g, lr, m: m * b + g, step=lambda p, b, g, lr, m: p - lr * b, decayed=True):
    def update(p, grad, b, lr, momentum=.9, decay=0.):
        g = grad + decay * p if decayed else grad
        b = buffer(b, g, lr, momentum)
        return step(p, b, g, lr, momentum) - (0 if decayed else lr * decay * p), b
    return update


RIGHT |= {
    "4.2": [auroc_loop, auroc_ranks, auroc_search, auroc],
    "4.3": [ece_loop, ece_numpy, ece_one_hot, calibration_error],
    "1.2": [split_torch, split_keys, split_python, split_labels],
    "1.3": [class_batch_streams, class_batch_by(lambda *key: np.random.RandomState(key).permutation(key[0])),
            class_batch_by(lambda n, seed, k, c: torch.randperm(n, generator=generator(seed, k, c)))],
    "2.2": [View, FlatView, LoopView, MultinomialView],
    "2.3": [cosines_loop, cosines_numpy, lambda f, t, scale=1.: scale * F.cosine_similarity(f[:, None], t[None], dim=2),
            zero_shot_logits],
    "12.2": [layer_plain, layer_front, layer_added, layer_loop],
    "12.3": [rows_loop, rows_means, rows_numpy],
    "10.2": [cutout_loop, cutout_mask, cutout_padded, cutout],
    "10.3": [theta_solve, theta_numpy, affine_theta],
    "11.2": [attention_loop, attention_numpy, F.scaled_dot_product_attention, naive_attention],
    "11.3": [patches_loop, patches_view, lambda x, p: F.unfold(x, p, stride=p).transpose(1, 2)],
    "13.2": [update_numpy, update_torch, update_in_place],
}

numpy_order = lambda *key: np.random.RandomState(key).permutation(key[0])
WRONG |= {
    "4.2": [lambda a, b: (a[:, None] > b).float().mean(),                     # ties lost
            lambda a, b: (a[:, None] >= b).float().mean(),                    # ties won
            lambda a, b: auroc(b, a),                                         # sign
            lambda a, b: a.mean() - b.mean(),                                 # a difference of means
            lambda a, b: ((a >= .5).float().mean() + (b < .5).float().mean()) / 2,           # a threshold
            lambda a, b: (a > b.median()).float().mean(),                     # against the middle one
            lambda a, b: auroc(a.softmax(0), b.softmax(0)),                   # probabilities for scores
            lambda a, b: float(np.mean([x > y for x, y in zip(a, b)]))],      # the first pairs alone
    "4.3": [wrong_ece(lambda gap, n, N: (gap / n.clamp(min=1)).abs(), lambda x: x.mean()),   # bins alike
            wrong_ece(lambda gap, n, N: gap / N, lambda x: x.sum().abs()),    # signs cancel
            wrong_ece(lambda gap, n, N: gap.abs()),                           # a sum for a mean
            wrong_ece(lambda gap, n, N: (gap / n.clamp(min=1)).abs(), lambda x: x.max()),    # the worst bin
            wrong_ece(lambda gap, n, N: (gap / n.clamp(min=1)) ** 2 * n / N), # squares
            wrong_ece(lower=True),                                            # an edge belongs to the bin above
            ece_without(0.), ece_without(1.),                                 # an end that is in no bin
            lambda conf, correct, bins=15: (conf - correct.float()).abs().mean(),            # image by image
            lambda conf, correct, bins=15: calibration_error(conf, correct, 15),
            lambda conf, correct, bins=15: calibration_error(conf, ~correct, bins)],
    "1.2": [split_by(lambda mine, n, seed, c: mine[:n]),                      # the first of each, whatever the seed
            split_by(lambda mine, n, seed, c: np.random.RandomState((seed, c)).choice(mine, n)),     # twice the same
            split_by(lambda mine, n, seed, c: np.random.RandomState((seed, c, n)).permutation(mine)[:n]), # not nested
            split_by(lambda mine, n, seed, c: np.random.RandomState(c).permutation(mine)[:n]),       # no seed
            split_by(lambda mine, n, seed, c: np.random.default_rng().permutation(mine)[:n]),        # not repeatable
            split_by(lambda mine, n, seed, c: np.random.RandomState((seed, c)).permutation(len(mine))[:n]), # places
            split_by(global_numpy),                                           # numpy's global generator
            lambda y, n, seed: split_labels(y[y < y.max()], n, seed),         # off-by-one class
            lambda y, n, seed: np.random.RandomState(seed).permutation(len(y))[:3 * n],      # not balanced
            lambda y, n, seed: torch.randperm(len(y))[:3 * n],
            lambda y, n, seed: y[split_labels(y, n, seed)]],                  # labels for positions
    "1.3": [class_batch_by(lambda n, seed, k, c: range(n)),                   # no order drawn
            class_batch_by(lambda n, seed, k, c: numpy_order(n, k, c)),       # no seed
            class_batch_by(lambda n, seed, k, c: numpy_order(n, seed, c)),    # passes repeat
            class_batch_by(lambda n, seed, k, c: numpy_order(n, seed, k)),    # the same others, always
            class_batch_by(lambda n, seed, k, c: torch.randperm(n)),          # global generator
            class_batch_by(lambda n, seed, k, c: np.random.RandomState((seed, k, c)).randint(n, size=n)), # drops images
            lambda y, seed, step: batch_indices(seed, step, len(y), 3),       # not balanced
            lambda y, seed, step: y[class_batch_streams(y, seed, step)]],     # labels for positions
    "2.2": [OneDraw, FrozenDraw, GlobalDraw, LastNever, Pairwise, MeanView, WholeView, ViewZero],
    "2.3": [lambda f, t, scale=1.: scale * f @ t.T,                           # no lengths
            lambda f, t, scale=1.: scale * F.normalize(f, dim=1) @ t.T,
            lambda f, t, scale=1.: scale * f @ F.normalize(t, dim=1).T,
            lambda f, t, scale=1.: scale * F.normalize(f, dim=0) @ F.normalize(t, dim=0).T,  # wrong axis
            lambda f, t, scale=1.: zero_shot_logits(f, t) / scale,
            lambda f, t, scale=1.: zero_shot_logits(f, t, scale).softmax(1),  # probabilities for logits
            lambda f, t, scale=1.: scale * f @ t.T / f.norm() / t.norm(dim=1), # the batch's length
            lambda f, t, scale=1.: zero_shot_logits(f, t, scale).abs()],
    "12.2": [lambda b, h, p: layer_added(replace(b, norm1=torch.nn.Identity()), h, p),       # no norm at all
             lambda b, h, p: layer_added(b, h, p, prompts_without("norm1")),
             lambda b, h, p: layer_added(b, h, p, prompts_without("k_norm")), # right for blocks that have none
             lambda b, h, p: layer_added(b, h, p, cut=lambda p: p.detach()),  # missing detach, the other way round
             lambda b, h, p: layer_added(b, h, p, feed=False),                # no MLP
             lambda b, h, p: b.module(torch.cat([h, p.expand(len(h), -1, -1)], 1)),          # carried on
             lambda b, h, p: b.module(torch.cat([p.expand(len(h), -1, -1), h], 1))[:, :h.shape[1]],  # the wrong end
             lambda b, h, p: b.module(h + p.sum(0)),                          # added for appended
             lambda b, h, p: b.module(h)],                                    # no prompts
    "12.3": [lambda f, y, n: F.normalize(torch.stack([f[y == k].mean(0) for k in range(n)]), dim=1),
             lambda f, y, n: torch.stack([F.normalize(f, dim=1)[y == k].mean(0) for k in range(n)]),
             lambda f, y, n: F.normalize(f, dim=1).mean(0).expand(n, -1),     # batch mean for class mean
             lambda f, y, n: rows_means(f, y, n).roll(1, 0),                  # off-by-one class
             lambda f, y, n: rows_means(F.normalize(f, dim=0), y, n),         # wrong axis
             lambda f, y, n: -rows_means(f, y, n),
             lambda f, y, n: F.normalize(torch.stack([f[y == k][0] for k in range(n)]), dim=1)], # the first image
    "10.2": [cutout_in_place, cutout_slices,
             lambda x, c, edge, fill=127: cutout(x, c.flip(1), edge, fill),   # wrong axis
             lambda x, c, edge, fill=127: cutout(x, c, edge + 1, fill),       # off by one
             lambda x, c, edge, fill=127: cutout(x, c - edge // 2, edge, fill),               # the centre
             lambda x, c, edge, fill=127: cutout(x, c.clamp(min=0), edge, fill),              # pushed inside
             lambda x, c, edge, fill=127: cutout(x, c[:1].expand(len(x), 2), edge, fill),     # one for the batch
             lambda x, c, edge, fill=127: cutout(x, c, edge, 127),
             lambda x, c, edge, fill=127: cutout(x, c, edge, fill).float()],  # another type
    "10.3": [lambda *a: theta_solve(*a, turn=-1),                             # sign
             lambda *a: theta_solve(*a, inverse=False),                       # the way there for the way back
             lambda *a: theta_solve(*a, order=lambda R, S: S @ R),            # order
             lambda *a: theta_solve(*a, shifted=False),                       # the shift not turned back
             lambda r, a, k, t: affine_theta(r.rad2deg(), a, k, t),           # degrees for radians
             lambda r, a, k, t: affine_theta(r, a, k, t.flip(1)),             # wrong axis
             lambda r, a, k, t: affine_theta(r, a, k, -t),
             lambda r, a, k, t: affine_theta(r, -a, k, t)],
    "11.2": [attention_by(lambda q, k: 1.),                                   # no scale
             attention_by(lambda q, k: 1 / q.shape[-1]),                      # d for √d
             attention_by(lambda q, k: k.shape[2] ** -.5),                    # √T for √d
             attention_by(axis=-2),                                           # wrong axis
             attention_by(lambda q, k: -q.shape[-1] ** -.5),                  # sign
             attention_by(soft=lambda s, axis: s.exp() / s.exp().sum(axis, keepdim=True)),    # overflows
             attention_by(soft=lambda s, axis: s.sigmoid()),                  # weights that do not sum to 1
             lambda q, k, v: naive_attention(q, v, k)],
    "11.3": [lambda x, p: patches_view(x, p, (0, 4, 2, 1, 3, 5)),             # column by column
             lambda x, p: patches_view(x, p, (0, 2, 4, 1, 5, 3)),             # transposed inside
             lambda x, p: patches_view(x, p, (0, 2, 4, 3, 5, 1)),             # channels last
             lambda x, p: x.reshape(len(x), -1, 3 * p * p),                   # a reshape for a cut
             lambda x, p: F.unfold(x, p, stride=p),                           # wrong axis
             lambda x, p: F.unfold(x, p, stride=1).transpose(1, 2)],          # overlapping
    "13.2": [update_by(decayed=False),                                        # decay beside the buffer
             update_by(lambda b, g, lr, m: m * b + (1 - m) * g),              # a running mean
             update_by(lambda b, g, lr, m: m * b + lr * g, lambda p, b, g, lr, m: p - b),     # lr inside the buffer
             update_by(lambda b, g, lr, m: g),                                # forgotten
             update_by(step=lambda p, b, g, lr, m: p + lr * b),               # sign
             update_by(step=lambda p, b, g, lr, m: p - lr * (g + m * b)),     # Nesterov's
             lambda p, g, b, lr, momentum=.9, decay=0.: update_in_place(p, g, b, lr, momentum, -decay),
             lambda p, g, b, lr, momentum=.9, decay=0.: update_in_place(p, g, b, lr, momentum, 0.)],
}


# the rivals, the paper's scale, several devices, the anchored algorithm, what to label
def gaussian_loop(conf, mu, var, n_sigma=2.):
    return [1. if c >= mu else float(torch.exp(-(c - mu) ** 2 * n_sigma ** 2 / (2 * var))) for c in conf]

def gaussian_where(conf, mu, var, n_sigma=2.):
    return torch.where(conf < mu, torch.exp(-.5 * ((conf - mu) / (var.sqrt() / n_sigma)) ** 2), 1.)

def gaussian_scipy(conf, mu, var, n_sigma=2.):
    from scipy.stats import norm
    at = norm(float(mu), float(var) ** .5 / n_sigma).pdf
    return at(np.minimum(conf.numpy(), float(mu))) / at(float(mu))

def quality_loop(weights, right):
    total = sum(w for w in weights.tolist())
    return total / len(weights), sum(w for w, r in zip(weights.tolist(), right.tolist()) if r) / total

def quality_numpy(weights, right):
    w = weights.numpy()
    return np.array([w.mean(), np.average(right.numpy(), weights=w)])

def quality_product(weights, right): return torch.stack([weights.mean(), (weights * right).sum() / weights.sum()])

def pace_scatter(table, idx, conf, pl, zeta=.7): return table.scatter(0, idx, torch.where(conf >= zeta, pl, table[idx]))

def pace_product(table, idx, conf, pl, zeta=.7):
    keep = (conf >= zeta).long()
    table[idx] = keep * pl + (1 - keep) * table[idx]
    return table

def pace_places(table, idx, conf, pl, zeta=.7): # which image of the batch stands at a place
    at = idx[:, None] == torch.arange(len(table), device=table.device)
    return torch.where((at & (conf >= zeta)[:, None]).any(0), (at * pl[:, None]).sum(0), table)

def pace_boolean(table, idx, conf, pl, zeta=.7):
    table[idx[conf >= zeta]] = pl[conf >= zeta]
    return table

def pace_nonzero(table, idx, conf, pl, zeta=.7):
    kept = (conf >= zeta).nonzero()[:, 0]
    return table.index_copy(0, idx[kept], pl[kept])

def pace_loop(table, idx, conf, pl, zeta=.7):
    for i, c, k in zip(idx, conf, pl):
        if c >= zeta: table[i] = k
    return table

def pace_by(keep=lambda c, zeta: c >= zeta, new=lambda conf, pl: pl, old=lambda t, i: t[i], at=lambda i: i):
    return lambda table, idx, conf, pl, zeta=.7: table.scatter(
        0, at(idx), torch.where(keep(conf, zeta), new(conf, pl), old(table, idx)))

def shard_split(z, n_views, rank, size):
    return z.reshape(n_views, -1, *z.shape[1:]).tensor_split(size, dim=1)[rank].flatten(0, 1)

def shard_numpy(z, n_views, rank, size):
    mine = np.array_split(np.arange(len(z) // n_views), size)[rank]
    return z.numpy()[(np.arange(n_views)[:, None] * (len(z) // n_views) + mine).ravel()]

def shard_loop(z, n_views, rank, size):
    n, rows = len(z) // n_views, []
    for v in range(n_views): rows += [z[v * n + i] for i in range(n) if i * size // n == rank]
    return torch.stack(rows)

def shard_by(take, n=None): # take(image numbers, rank, size)
    def shard(z, n_views, rank, size):
        images = take(torch.arange(len(z) // n_views), rank, size)
        return torch.cat([view[images] for view in z.chunk(n_views)])
    return shard

def agreement_loop(p, a_ulb_w):
    out, C = [], p.shape[1]
    for row, a in zip(p.tolist(), a_ulb_w.tolist()):
        e = [np.exp(v - max(a)) for v in a]
        out.append(max(0., (sum(x * y for x, y in zip(row, e)) / sum(e) - 1 / C) / (1 - 1 / C)))
    return torch.tensor(out)

def agreement_numpy(p, a_ulb_w):
    from scipy.special import softmax
    agree = np.einsum("uc,uc->u", p.detach().numpy(), softmax(a_ulb_w.detach().numpy(), 1))
    return np.maximum((agree * p.shape[1] - 1) / (p.shape[1] - 1), 0)

@torch.no_grad()
def agreement_diagonal(p, a_ulb_w):
    C = p.shape[1]
    return F.relu((p @ F.softmax(a_ulb_w, -1).T).diagonal() * C / (C - 1) - 1 / (C - 1))

def agreement_by(agree=lambda p, q: (p * q).sum(1), fit=lambda s, C: ((s - 1 / C) / (1 - 1 / C)).clamp(min=0),
                 soft=lambda a: a.softmax(1)):
    return lambda p, a_ulb_w: fit(agree(p.detach(), soft(a_ulb_w.detach())), p.shape[1])

def typical_cdist(feat, k=20): return 1 / torch.cdist(feat, feat).topk(k + 1, largest=False).values[:, 1:].mean(1)

def typical_loop(feat, k=20):
    out = []
    for i, x in enumerate(feat):
        apart = sorted(float((x - other).norm()) for j, other in enumerate(feat) if j != i)
        out.append(k / sum(apart[:k]))
    return out

def typical_sklearn(feat, k=20):
    from sklearn.neighbors import NearestNeighbors
    return 1 / NearestNeighbors(n_neighbors=k).fit(feat.numpy()).kneighbors()[0].mean(1)

def typical_cosines(feat, k=20):
    apart = (2 - 2 * feat @ feat.T).clamp(min=0).sqrt().fill_diagonal_(torch.inf)
    return k / apart.sort(1).values[:, :k].sum(1)

def typical_by(near=lambda d, k: d.sort(1).values[:, 1:k + 1], last=lambda d: 1 / d.mean(1)):
    return lambda feat, k=20: last(near(torch.cdist(feat, feat), k))


RIGHT |= {
    "9.2": [gaussian_loop, gaussian_where, gaussian_scipy, gaussian_weights],
    "9.3": [quality_loop, quality_numpy, quality_product],
    "14.2": [pace_scatter, pace_product, pace_places],
    "15.2": [shard_split, shard_numpy, shard_loop, shard_views],
    "16.2": [agreement_loop, agreement_numpy, agreement_diagonal, agreement_weights],
    "17.2": [typical_cdist, typical_loop, typical_sklearn, typical_cosines, typicality],
}
WRONG |= {
    "9.2": [lambda c, mu, var, n_sigma=2.: torch.exp(-(c - mu) ** 2 * n_sigma ** 2 / (2 * var)),     # the whole bell
            lambda c, mu, var, n_sigma=2.: gaussian_weights(c, mu, var, 1.),                         # σ for σ/n
            lambda c, mu, var, n_sigma=2.: gaussian_weights(c, mu, var, 1 / n_sigma),                # times n
            lambda c, mu, var, n_sigma=2.: gaussian_weights(c, mu, var, n_sigma ** .5),
            lambda c, mu, var, n_sigma=2.: gaussian_weights(c, mu, var ** 2, n_sigma),               # σ² for σ
            lambda c, mu, var, n_sigma=2.: gaussian_weights(c, mu, var / 2, n_sigma),                # the 2 forgotten
            lambda c, mu, var, n_sigma=2.: gaussian_weights(-c, -mu, var, n_sigma),                  # sign
            lambda c, mu, var, n_sigma=2.: (c >= mu).float(),                                        # a threshold
            lambda c, mu, var, n_sigma=2.: gaussian_weights(c, mu, var, n_sigma) / (2 * np.pi * var).sqrt()],
    "9.3": [lambda w, r: (w.mean(), r[w > 0].float().mean()),                 # of the kept, all alike
            lambda w, r: (w.mean(), (w * r).mean()),                          # a mean over all images
            lambda w, r: ((w > 0).float().mean(), (w * r).sum() / w.sum()),   # a count for a mean
            lambda w, r: ((w * r).sum() / w.sum(), w.mean()),                 # the wrong way round
            lambda w, r: (w.mean(), (w * r).sum() / r.sum()),                 # over the right ones
            lambda w, r: (w.sum(), (w * r).sum() / w.sum()),
            lambda w, r: (w.mean(), r.float().mean()),                        # unweighted
            lambda w, r: (w[r].mean(), (w * r).sum() / w.sum())],
    "14.2": [pace_boolean, pace_nonzero, pace_loop,                           # the host waits
             pace_by(keep=lambda c, zeta: c > zeta),                          # ζ itself is left out
             pace_by(keep=lambda c, zeta: c < zeta),                          # sign
             pace_by(keep=lambda c, zeta: c >= .7),
             pace_by(keep=lambda c, zeta: torch.ones_like(c, dtype=torch.bool)), # all enter
             pace_by(new=lambda c, pl: pl + 1),                               # off-by-one class
             pace_by(new=lambda c, pl: c.long()),                             # confidences for labels
             pace_by(old=lambda t, i: torch.full_like(i, -1)),                # doubt clears the entry
             pace_by(old=lambda t, i: t[:len(i)]),                            # another image's entry
             pace_by(at=lambda i: torch.arange(len(i), device=i.device))],    # places in the batch
    "15.2": [lambda z, V, r, n: z.tensor_split(n)[r],                         # rows, not images
             lambda z, V, r, n: z.unflatten(0, (-1, V)).tensor_split(n)[r].flatten(0, 1),            # image-major
             lambda z, V, r, n: shard_views(z[:len(z) // V], 1, r, n),        # one view alone
             lambda z, V, r, n: shard_split(z, V, r, n).unflatten(0, (V, -1)).transpose(0, 1).flatten(0, 1),
             lambda z, V, r, n: shard_split(z, V, (r + 1) % n, n),            # another's part
             shard_by(lambda i, r, n: i[r::n]),                               # not neighbours
             shard_by(lambda i, r, n: i[r * (len(i) // n):(r + 1) * (len(i) // n)]),                 # some left out
             shard_by(lambda i, r, n: i[r * (len(i) // n):None if r == n - 1 else (r + 1) * (len(i) // n)]),
             shard_by(lambda i, r, n: i[len(i) * r // n:len(i) * (r + 1) // n + 1])],                # some twice
    "16.2": [lambda p, a: (((p * a.softmax(1)).sum(1) - 1 / p.shape[1]) / (1 - 1 / p.shape[1])).clamp(min=0), # detach
             agreement_by(fit=lambda s, C: s),                                # not corrected
             agreement_by(fit=lambda s, C: (s - 1 / C).clamp(min=0)),         # not stretched
             agreement_by(fit=lambda s, C: (s - 1 / C) / (1 - 1 / C)),        # below 0
             agreement_by(fit=lambda s, C: ((s - .25) / .75).clamp(min=0)),   # always four classes
             agreement_by(soft=lambda a: a.softmax(0)),                       # wrong axis
             agreement_by(soft=lambda a: a),                                  # logits for probabilities
             agreement_by(agree=lambda p, q: p.amax(1) * q.amax(1)),          # both sure, of whatever
             agreement_by(agree=lambda p, q: (p.argmax(1) == q.argmax(1)).float()),                  # labels alone
             agreement_by(agree=lambda p, q: q.amax(1)),                      # FineSSL's confidence
             agreement_by(agree=lambda p, q: (p @ q.T).mean(1))],             # with other images' anchors
    "17.2": [typical_by(near=lambda d, k: d.sort(1).values[:, :k]),           # its own neighbour
             typical_by(near=lambda d, k: d.sort(1).values[:, :k + 1]),
             typical_by(near=lambda d, k: d.sort(1).values[:, -k:]),          # the farthest
             typical_by(near=lambda d, k: d.sort(1).values[:, 1:]),           # all others
             typical_by(near=lambda d, k: d.sort(1).values[:, k:k + 1]),      # the K-th alone
             typical_by(last=lambda d: d.mean(1)),                            # not inverted
             typical_by(last=lambda d: 1 / d.sum(1)),                         # a sum for a mean
             typical_by(last=lambda d: (1 / d).mean(1)),                      # a mean of inverses
             typical_by(last=lambda d: 1 / (d ** 2).mean(1)),                 # squares
             lambda feat, k=20: (feat @ feat.T).topk(k + 1).values[:, 1:].mean(1)],                  # cosines
}


@pytest.mark.parametrize("number", RUN)
def test_a_stub_fails_and_its_solution_passes_with_nothing_but_the_imports(number):
    e = exercises[number][1]
    assert (why := check(number, e.stub)), "the check is green before anything is done"
    assert " " in why, f"an untouched stub is told {why!r} and nothing else"
    assert not (why := check(number, e.solution)), why
    if e.bonus: assert check(number, e.stub, bonus=True) and not check(number, e.solution, bonus=True)


@pytest.mark.parametrize("number", RUN)
def test_an_exercise_needs_the_imports_of_its_notebook_and_of_its_stub_and_nothing_else(number):
    path, e = exercises[number]
    names = base(path, whole=False)
    for source in (e.stub, e.solution, e.check): exec(source, names)


@pytest.mark.parametrize("number", CODE)
def test_right_variants_pass_without_the_bonus_and_wrong_ones_fail(number):
    name, = defined_names(exercises[number][1].stub)
    assert len(RIGHT[number]) >= 3 and len(WRONG[number]) >= 5
    for i, f in enumerate(RIGHT[number]): assert not (why := check(number, **{name: f})), f"right variant {i}: {why}"
    for i, f in enumerate(WRONG[number]): assert check(number, **{name: f}), f"wrong variant {i} was accepted"


def test_a_failing_check_says_which_property_for_which_input_with_both_values():
    why = check("5.2", my_class_margins=lambda counts, alpha=8., form="code": class_margins(counts, alpha, "paper"))
    assert why.startswith("code: α_t (1 − β)/(1 + β): f([10, 5, 0], 8.0, 'code') gave [0.0, 4.0, 8.0], expected [0.0,")
    assert check("5.1", "my_margin = 4.8").endswith("is not right (to within 0.006)")
    why = check("3.2", my_fixmatch=lambda *args: fixmatch_views(*args).item())
    assert why.startswith("the kept image alone teaches: f([[") and "gave 1.0397" in why
    assert why.endswith("expected a tensor, through which a gradient can flow")
    why = check("6.3", my_aux_loss=wrong_aux(lambda f, w: f.detach() @ w.detach().T))
    assert why.startswith("the head learns: its rows get a gradient: f([[")
    assert "has in its argument 2 the gradient [[0.0, 0.0], [0.0, 0.0]], expected [[" in why
    why = check("5.3", my_margin_loss=WRONG["5.3"][-1])
    assert why == ("the logits given must not change: f([[0.0, 0.0]], [0], [1.0986, 0.0]) turned [[0.0, 0.0]] into "
                   "[[-1.0986, 0.0]], expected to find it as it was")


NEAR = {"0.2": (11,), "0.4": (.21, .213), "3.1": (.549, .5493, .55), "3.3": (.5, .503), "5.1": (3.6,),
        "5.4": (.68, .686, .7), "6.1": (.21, .208), "6.4": (.6, .61), "7.1": (1.8,), "7.4": (1.6,), "8.1": (.48,),
        "8.3": (.67, .677, .68), "4.1": (.36,), "4.4": (.12, .121), "1.1": (16,), "1.4": (4.1, 4.05),
        "2.1": (.73, .731), "2.4": (3.6, 3.65, 3.7), "12.1": (338, 337.9, 337.92), "12.4": (.2, .21, .19),
        "10.1": (1.13, 1.127), "10.4": (.055, .0549), "11.1": (.817, .8167), "11.4": (.8, .79), "13.1": (.0256,),
        "13.3": (29,), "9.1": (.141, .1412), "9.4": (1386, 1385.6, 1380), "14.1": (.29, .286, .28),
        "14.4": (5.66, 5.7, 5.6), "15.1": (1.17, 1.167), "15.4": (.61, .6, .607), "16.1": (.525, .53, .52),
        "16.3": (.185, .1849),
        "17.1": (.375, .38), "17.3": (56, 57, 55)}
FAR = {"0.2": (7, 8, 10), "0.4": (.1, .125, .2, .5, .0625), "3.1": (1.0986, .824, .2747), "3.3": (.84, .93, .95),
       "5.1": (4.8, 4.5, 2.88), "5.4": (.553, .1, .314, 1.), "6.1": (.166, .199, .05, .79), "6.4": (.5, .75, .81, .55),
       "7.1": (2.08, .6, 3.), "7.4": (3., 1.2, .3),
       "8.1": (.8, .24, .96, .4), "8.3": (0, .79, .36, .32),
       "4.1": (.417, .3125, .08, .52), "4.4": (0, .04, .01), "1.1": (12, 32, 384, 0), "1.4": (3.66, 29.3, 2, 5),
       "2.1": (.99, .55, .8, .269), "2.4": (4.58, 8, 3.5, 1), "12.1": (184, 261, 169, 337922),
       "12.4": (.1, .386, .7), "10.1": (.78, 2.92, 742, .08), "10.4": (.0625, .047, .25),
       "11.1": (.183, .833, .98), "11.4": (.124, .5, 1.), "13.1": (.0225, .0277, .0283, .03), "13.3": (10, 28, 30),
       "9.1": (.343, .24, .16, .158, .0686), "9.4": (1000, 693, 750, 1503, 14), "14.1": (.25, .3, .333, .4),
       "14.4": (4, 16, 3.98, 2, 8), "15.1": (1.75, .857, .119, 2.5, 4), "15.4": (1., .59, .2, .41, .8),
       "16.1": (1.35, .35, .175, 1.5), "16.3": (.132, .333, .168, .193, .16, .1),
       "17.1": (.75, .528, 2.67, .125, .5), "17.3": (50, 29.3, 39, 46)}

def test_numbers_as_textbooks_round_them_are_taken_and_wrong_ideas_are_not():
    for number, (_, e) in exercises.items():
        if e.kind not in ("by hand", "experiment"): continue
        name = defined_names(e.stub)[0]
        assert f'check_number("{number}", {name})' in e.check, "the answer does not stand below the question"
        assert number in NEAR and number in FAR, f"no numbers for {number}"
        for v in NEAR[number]: assert not check(number, f"{name} = {v}"), (number, v)
        for v in FAR[number]: assert check(number, f"{name} = {v}"), (number, v)


def test_a_notebook_has_three_to_five_of_different_kinds():
    for path, es in sources.items():
        assert 3 <= len(es) <= 5, f"{path} has {len(es)} exercises"
        assert {e.kind for e in es} >= {"by hand", "code", "experiment", "explain"}, path


def test_the_solutions_get_all_points_where_submissions_run_and_a_changed_check_gets_none(monkeypatch):
    monkeypatch.setattr(runner, "limit_memory", lambda megabytes: True)      # this process goes on
    path, e = exercises["5.2"]
    both = [e, exercises["5.3"][1]]
    cells = [{"cell_type": "markdown", "source": "## Exercises"},
             *({"cell_type": "code", "source": x.solution.replace("solution", "stub")} for x in both)]
    patch = {"cell_type": "code", "source": "import finessl.checks.margin as m\nm.expect = lambda *args: None"}
    for extra, points in ([], 4), ([patch], 0):
        job = make_job(read_notebook(Path(path)), both, {"cells": cells + extra}, Limits())
        before, events = check_margin.expect, []
        try: runner.run_submission(job, lambda **event: events.append(event))
        finally: check_margin.expect = before
        marked = [x for x in events if x["event"] == "marked"]
        assert len(marked) == 4 and sum(x["ok"] for x in marked) == points, marked
