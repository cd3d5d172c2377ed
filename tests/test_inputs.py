"Images, data sets and encoders of other libraries: taken where what is meant is plain, one sentence otherwise."
import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from finessl.algorithms import FineSSL
from finessl.data import Dataset, digits
from finessl.engine.errors import DataError
from finessl.engine.inputs import as_images
from finessl.engine.runs import load_run
from finessl.training import Runtime, Schedule, Settings, fit

WHOLE = digits(1, 0)
DATA = WHOLE._replace(x_ulb=WHOLE.x_ulb[:20], y_ulb=WHOLE.y_ulb[:20], x_test=WHOLE.x_test[:10],
                      y_test=WHOLE.y_test[:10], split=None)
SHORT = dict(steps=2, evals=1, batch=4, progress=False)


def own(seed=0):
    "An encoder of one's own."
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())


def tiny_vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3,
                             num_classes=0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Photographs by class, and a finished run."
    root = tmp_path_factory.mktemp("inputs")
    for i, name in enumerate(("cat", "dog")):
        (root / "photos" / name).mkdir(parents=True)
        for n in range(3):
            picture = np.random.RandomState(3 * i + n).randint(0, 255, (24, 20, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / "photos" / name / f"{n}.png")
    return root, fit(DATA, "pocket", FineSSL(), out=root / "run", **SHORT)


def test_predict_gives_one_answer_for_one_image_in_every_form(place):
    root, run = place
    file = root / "photos" / "cat" / "0.png"
    want, picture = run.predict([file]), Image.open(file)
    forms = {"path": file, "text": str(file), "array of paths": np.array([str(file)]), "PIL": picture,
             "[PIL]": [picture],
             "array of objects": np.array([str(file)], dtype=object)}
    for name, form in forms.items(): assert torch.equal(run.predict(form), want), name
    x = DATA.x_test[:3]
    want = run.predict(x)
    for form in (x.numpy(), list(x), x / 255, x.numpy().transpose(0, 2, 3, 1), tuple(x.numpy()), iter(x)):
        assert torch.equal(run.predict(form), want)
    assert torch.equal(run.predict(x[0]), run.predict(x[:1])) and run.predict([]).shape == (0, 10)
    assert run.predict([file, x[0], picture]).shape == (3, 10)


@pytest.mark.parametrize("wrong", [3, None, b"x", {"a": 1}, object(), DATA, [None], [(1, 2)], torch.zeros(2),
                                   torch.zeros(1, 3, 4, 4) - 1, np.zeros((1, 2, 4, 5, 6), np.uint8), np.float64(3),
                                   torch.zeros(1, 3, 4, 4, dtype=torch.complex64), torch.utils.data.DataLoader([1])],
                         ids=lambda x: type(x).__name__)
def test_predict_says_what_is_wanted(place, wrong):
    with pytest.raises(ValueError, match="image"): place[1].predict(wrong)


def test_a_folder_of_torchvision_becomes_a_dataset(place):
    folder = torchvision.datasets.ImageFolder(place[0] / "photos")
    ds = Dataset.from_torch(folder, [x for x, _ in folder], folder)
    assert ds.classes == ("cat", "dog") and ds.x_lb.shape == (6, 3, 256, 256) and ds.y_lb.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(ds.x_ulb) == 12 and ds.y_ulb[6:].tolist() == [-1] * 6 and len(ds.x_test) == 6
    small = Dataset.from_torch(folder, image_size=16)
    assert small.x_lb.shape[-1] == 16
    scaled = torchvision.datasets.ImageFolder(place[0] / "photos", torchvision.transforms.Compose(
        [torchvision.transforms.Resize((16, 16)), torchvision.transforms.ToTensor()]))
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(scaled, [0, 1, 5]), 2, shuffle=True)
    some = Dataset.from_torch(loader, (DATA.x_ulb, DATA.y_ulb))
    assert some.x_lb.shape == (3, 3, 16, 16) and some.classes == ("cat", "dog") and some.x_ulb.shape == (23, 3, 16, 16)
    fit(some, "pocket", FineSSL(), **SHORT)


@pytest.mark.parametrize("wrong, says", [
    ((3,), "labelled must be a data set"), (([],), "holds no images"), ((None,), "labelled must be"),
    (([("a", 0)],), "image file does not exist"), (([(DATA.x_lb[0], "cat")],), r"the label of labelled\[0\]"),
    (([(DATA.x_lb[0], 0)],), "at least 2 classes"),
    ((list(zip(DATA.x_lb, DATA.y_lb)), [None]), r"unlabelled\[0\] is NoneType"),
    ((list(zip(DATA.x_lb / 128 - 1, DATA.y_lb)),), r"labelled\[.\] must be uint8")])
def test_data_sets_that_are_none_are_named(wrong, says):
    with pytest.raises(ValueError, match=says): Dataset.from_torch(*wrong)


FOREIGN = {
    "torchvision data set": (lambda: (torchvision.datasets.FakeData(2), "pocket", FineSSL()), "Dataset.from_torch"),
    "pair": (lambda: ((DATA.x_lb, DATA.y_lb), "pocket", FineSSL()), "Dataset.from_torch"),
    "loader": (lambda: (torch.utils.data.DataLoader([1]), "pocket", FineSSL()), "Dataset.from_torch"),
    "nothing": (lambda: (None, "pocket", FineSSL()), "dataset must be"),
    "class of an algorithm": (lambda: (DATA, "pocket", FineSSL), r"write FineSSL\(\)"),
    "name of an algorithm": (lambda: (DATA, "pocket", "finessl"), "algorithm must be a value"),
    "function": (lambda: (DATA, "pocket", lambda z, s: 0), "algorithm must be a value"),
    "encoder of nothing": (lambda: (DATA, None, FineSSL()), "backbone must be an Encoder"),
    "encoder of numbers": (lambda: (DATA, 3, FineSSL()), "backbone must be an Encoder"),
    "prompts in a module": (lambda: (DATA, own(), FineSSL()), 'peft must be "linear"'),
    "module of something else": (lambda: (DATA, nn.Linear(2, 2), FineSSL()), "does not take images"),
    "settings of a dict": (lambda: (DATA, "pocket", FineSSL(), {"steps": 2}), r"settings must be Settings\(…\)"),
    "runtime of a dict": (lambda: (DATA, "pocket", FineSSL(), Settings(), {"a": 2}), r"runtime must be Runtime\(…\)"),
    "schedule of a number": (lambda: (DATA, "pocket", FineSSL(), Settings(schedule=20)), "schedule must be a Schedule")}


@pytest.mark.parametrize("name", FOREIGN)
def test_fit_says_what_is_wanted(name):
    arguments, says = FOREIGN[name]
    with pytest.raises((ValueError, TypeError), match=says): fit(*arguments())


def test_a_module_is_an_encoder_with_heads_and_comes_back(tmp_path):
    run = fit(DATA, own(), FineSSL(), peft="linear", out=tmp_path / "run", **SHORT)
    again = load_run(tmp_path / "run", backbone=own())
    assert torch.equal(again.predict(DATA.x_test), run.predict(DATA.x_test))
    with pytest.raises(ValueError, match="has other weights here"): load_run(tmp_path / "run", backbone=own(1))
    with pytest.raises(ValueError, match=r"give it as load_run\(…, backbone=…\)"): load_run(tmp_path / "run")
    assert run.record["n_prompts"] == 0 and run.record["image_size"] == 32


def test_a_module_is_neither_trained_nor_changed(tmp_path):
    encoder = own()
    before = {k: v.clone() for k, v in encoder.state_dict().items()} # the running means of its norms too
    fit(DATA, encoder, FineSSL(), peft="linear", **SHORT)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_a_vit_of_timm_is_taken_apart():
    assert fit(DATA, tiny_vit(), FineSSL(), **SHORT).record["n_prompts"] > 0


PICTURE = Image.fromarray(np.random.RandomState(0).randint(0, 255, (24, 24, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["HSV", "RGBX", "RGBa", "PA", "La", "LA", "CMYK", "YCbCr", "I;16", "1", "P"])
def test_pictures_of_every_mode_are_read(mode):
    grey = mode in ("PA", "La", "LA", "I;16", "1")
    picture = PICTURE.convert("LA" if mode in ("PA", "La") else "RGBA" if mode == "RGBa" else
                              "I" if mode == "I;16" else "RGB").convert(mode)
    out = as_images(picture, 24)
    assert out.shape == (1, 3, 24, 24) and (grey or (out[0].float() - as_images(PICTURE, 24)[0]).abs().mean() < 20)


def test_what_stands_beside_the_pixels_of_a_picture_fails_nothing():
    for key, value in (("exif", b"Exif\0\0garbage"), ("icc_profile", 5)):
        picture = PICTURE.copy()
        picture.info[key] = value
        assert (as_images(picture, 24) == as_images(PICTURE, 24)).all()
    picture = PICTURE.copy()
    picture.getexif()[0x010e] = object()
    assert (as_images(picture, 24) == as_images(PICTURE, 24)).all()
    turned = PICTURE.copy()
    turned.getexif()[0x0112] = 6
    assert (as_images(turned, 24)[0] == as_images(PICTURE.transpose(Image.Transpose.ROTATE_270), 24)[0]).all()


def name_of(value): # of a test: no address of an object in it, which differs from worker to worker
    return value if isinstance(value, str) else type(value).__name__


def closed():
    picture = PICTURE.copy()
    picture.close()
    return picture


@pytest.mark.parametrize("wrong, says", [
    (Image.new("RGB", (0, 0)), "images has no pixels"), (PICTURE.convert("L").convert("F"), "floating-point"),
    (np.zeros((4, 4), "uint16"), "got torch.uint16 from 0 to 0"), (np.zeros(3, [("a", "u1")]), "must be uint8"),
    (np.full((4, 4), 7, ">u2"), "from 7 to 7"), (torch.zeros(3, 4, 4).to_sparse(), "got a sparse one"),
    (torch.zeros(3, 4, 4, device="meta"), "got a meta one"), (memoryview(b"abc"), "got memoryview"),
    (pytest.importorskip("pandas").DataFrame({"file": ["a.png"]}), "got DataFrame")], ids=name_of)
def test_an_image_that_is_none_is_named(wrong, says):
    with pytest.raises(DataError, match=says) as e: as_images(wrong, 24)
    assert "finessl-" not in str(e.value)                      # no name of a temporary file


IMAGES, LABELS = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])


def test_labels_are_whole_numbers_of_any_library():
    pairs = lambda label: [(x, label(y)) for x, y in zip(IMAGES, LABELS.tolist())]
    for kind in (float, np.float64, np.uint8, np.array, torch.tensor, bool, lambda y: torch.tensor(float(y))):
        assert Dataset.from_torch(pairs(kind)).y_lb.tolist() == [0, 1, 0, 1]
    for kind in (lambda y: torch.tensor(y + .7), lambda y: torch.tensor(float("nan")), lambda y: y + .5, str):
        with pytest.raises(DataError, match=r"the label of labelled\[0\] must be a whole number"):
            Dataset.from_torch(pairs(kind))
    with pytest.raises(DataError, match="labels go up to 1000000000"):
        Dataset.from_torch(pairs(lambda y: 10**9 * y))         # before a name is made for each
    with pytest.raises(DataError, match="without a label"): Dataset.from_torch(pairs(lambda y: -1))


@pytest.mark.parametrize("given, says", [
    (dict(labelled=(IMAGES, LABELS[:3])), "4 images and 3 labels"), (dict(labelled="photos"), "must be a data set"),
    (dict(labelled=[(x, 0, 1) for x in IMAGES]), "got tuple of 3"), (dict(classes=5), "must be the names"),
    (dict(labelled=[{"image": x, "label": 0} for x in IMAGES]), "got dict of 2"), (dict(classes="ab"), "the names"),
    (dict(image_size=10**6), "image_size must be"), (dict(image_size="24"), "image_size must be")], ids=name_of)
def test_data_sets_of_torch_that_are_none_are_named(given, says):
    with pytest.raises(DataError, match=says): Dataset.from_torch(**{"labelled": (IMAGES, LABELS)} | given)


def test_a_pool_may_be_a_tensor_or_an_array():
    for pool in (IMAGES, IMAGES.numpy()):
        assert len(Dataset.from_torch((IMAGES, LABELS), pool, (IMAGES, LABELS)).x_ulb) == 8


def test_two_classes_of_one_name_are_refused_before_the_first_step():
    for names in (("a", "a"), (0, "0")):
        data = Dataset.from_torch((IMAGES, LABELS))._replace(classes=names)
        with pytest.raises(DataError, match="two classes are called"): fit(data, "pocket", FineSSL(), **SHORT)
