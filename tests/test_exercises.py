"""The exercises are fair: a stub fails its check, the solution passes, and so do other right answers; wrong ones that
students write are rejected. Of every coding exercise at least three right variants and five wrong ones."""
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import finessl.checks.margin as check_margin
from finessl.algorithms import finessl_loss
from finessl.course import runner
from finessl.course.exercises import code_of, exported_module, find_sources, is_imports, read_mark, read_notebook
from finessl.course.grade import Limits, defined_names, make_job
from finessl.margin import balanced_margin_loss, class_margins
from finessl.reweighting import confidence_weights
from finessl.smoothing import smooth_targets

root = Path(__file__).resolve().parent.parent
sources = find_sources(root / "nbs")
exercises = {e.number: (path, e) for path, es in sources.items() for e in es}
CODE = [n for n, (_, e) in exercises.items() if e.kind == "code"]
RUN = [n for n, (_, e) in exercises.items() if e.kind != "explain"]
_bases = {}


def base(path): # the names that an exercise may take as given
    if path not in _bases:
        names, nb = {"__name__": "__main__"}, read_notebook(Path(path))
        for c in nb["cells"]:
            if c["cell_type"] == "code" and is_imports(c) and read_mark(c) is None: exec(code_of(c), names)
        module = __import__(exported_module(nb), fromlist=["*"])
        _bases[path] = names | {k: v for k, v in vars(module).items() if k[0] != "_"}
    return dict(_bases[path])


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
                  psi=lambda z, a: a, on=smooth_targets, spread=lambda t, V: t.repeat(V), plain=True):
    q, V = (z_w.detach() if cut else z_w).softmax(1), len(z_s) // len(z_w)
    weights = spread(psi(q, (a_w.detach() if cut else a_w).softmax(1)).amax(1), V)
    (conf, pl), C = q.max(1), z_lb.shape[1]
    pl, mask = spread(pl, V), spread(conf >= zeta, V)
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
            lambda z, y, m, reduction="mean": balanced_margin_loss(z, y, m)], # the mean for every reduction
    "6.2": [lambda y, n, lam=.5, form="code": smooth_targets(y, n, lam, "paper"),
            lambda y, n, lam=.5, form="code": smooth_targets(y, n, lam, "code"),
            lambda y, n, lam=.5, form="code": smooth_targets(y, n, 1 - lam, form),           # λ on the label
            lambda y, n, lam=.5, form="code": F.one_hot(y, n) * (1 - lam) + lam / n,         # one formula for both
            lambda y, n, lam=.5, form="code": smooth_targets(y, n, lam, form).T,             # wrong axis
            lambda y, n, lam=.5, form="code": smooth_targets((y + 1) % n, n, lam, form)],    # off-by-one class
    "6.3": [wrong_aux(lambda f, w: f @ w.T),                                  # missing detach
            wrong_aux(lambda f, w: f.detach() @ w.detach().T + 0 * w.sum()),  # the head does not learn
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


@pytest.mark.parametrize("number", RUN)
def test_a_stub_fails_and_its_solution_passes_with_nothing_but_the_imports(number):
    e = exercises[number][1]
    assert check(number, e.stub), "the check is green before anything is done"
    assert not (why := check(number, e.solution)), why
    if e.bonus: assert check(number, e.stub, bonus=True) and not check(number, e.solution, bonus=True)


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


NEAR = {"0.2": (11,), "3.1": (.549, .5493, .55), "3.3": (.5, .503), "5.1": (3.6,),
        "5.4": (1.95, 2.), "6.1": (1.79, 1.8), "6.4": (.75,), "7.1": (1.8,), "7.4": (1.6,), "8.1": (.48,)}
FAR = {"0.2": (7, 8, 10), "3.1": (1.0986, .824, .2747), "3.3": (.84, .93, .95),
       "5.1": (4.8, 4.5, 2.88), "5.4": (2.67, .92), "6.1": (2.14, .405, 6.), "6.4": (.5, 1., .55),
       "7.1": (2.08, .6, 3.), "7.4": (3., 1.2, .3),
       "8.1": (.8, .24, .96, .4)}

def test_numbers_as_textbooks_round_them_are_taken_and_wrong_ideas_are_not():
    for number, (_, e) in exercises.items():
        if e.kind not in ("by hand", "experiment"): continue
        name = defined_names(e.stub)[0]
        assert number in NEAR and number in FAR, f"no numbers for {number}"
        for v in NEAR[number]: assert not check(number, f"{name} = {v}"), (number, v)
        for v in FAR[number]: assert check(number, f"{name} = {v}"), (number, v)


def test_a_notebook_has_three_to_five_of_different_kinds():
    for path, es in sources.items():
        assert 3 <= len(es) <= 5, f"{path} has {len(es)} exercises"
        assert "explain" in {e.kind for e in es} and "code" in {e.kind for e in es}, path


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
