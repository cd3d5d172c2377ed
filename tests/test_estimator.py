"""finessl in scikit-learn's form: its own checks, unlabelled rows, vectors and images."""
import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from finessl.engine.estimator import EXPECTED_FAILURES, FineSSLClassifier
from finessl.pseudo_labels import SupervisedOnly

expected = lambda estimator: EXPECTED_FAILURES


@parametrize_with_checks([FineSSLClassifier(steps=40)], expected_failed_checks=expected)
def test_scikit_learns_own_checks(estimator, check): check(estimator)


@pytest.fixture(scope="module")
def rows():
    X, truth = load_digits(return_X_y=True)
    X, truth, y = X[:1000], truth[:1000], np.full(1000, -1)
    for c in range(10): y[np.flatnonzero(truth == c)[:2]] = c
    return X, truth, y


def test_unlabelled_rows_help(rows):
    X, truth, y = rows
    model = FineSSLClassifier(random_state=0).fit(X, y)
    scale = StandardScaler().fit(X[y >= 0])
    alone = LogisticRegression(max_iter=1000).fit(scale.transform(X[y >= 0]), y[y >= 0])
    assert model.score(X, truth) > alone.score(scale.transform(X), truth) + .03
    assert model.classes_.tolist() == list(range(10)) and np.allclose(model.predict_proba(X).sum(1), 1)
    again = pickle.loads(pickle.dumps(clone(model).fit(X, y)))
    assert np.array_equal(again.predict_proba(X), model.predict_proba(X))


def test_labels_of_text_and_of_objects(rows):
    X, _, y = rows
    names = np.array([*"abcdefghij"])
    text = np.where(y < 0, "-1", names[y])
    mixed = np.array([-1 if k < 0 else str(names[k]) for k in y], dtype=object)
    want = FineSSLClassifier(steps=20, random_state=0).fit(X, y)
    for labels in (text, mixed):
        model = FineSSLClassifier(steps=20, random_state=0).fit(X, labels)
        assert model.classes_.tolist() == [*"abcdefghij"]
        assert np.array_equal(model.predict(X), names[want.predict(X)])


def test_in_a_grid(rows):
    X, truth, _ = rows
    grid = GridSearchCV(FineSSLClassifier(SupervisedOnly(), steps=5, random_state=0), {"lr": [.01, .1]}, cv=2)
    assert grid.fit(X[:200], truth[:200]).best_params_["lr"] in (.01, .1)


def test_images_too(tmp_path):
    bunch = load_digits()
    images = (bunch.images[:60, None] * 15.9).astype("uint8").repeat(4, 2).repeat(4, 3)
    y = np.where(np.arange(60) < 30, bunch.target[:60], -1)
    model = FineSSLClassifier(backbone="pocket", steps=3, batch=4, random_state=0, options={"n_prompts": 1})
    p = model.fit(images, y).predict_proba(images)
    assert p.shape == (60, 10) and np.allclose(p.sum(1), 1, atol=1e-6)
    assert np.array_equal(model.predict(images), model.classes_[p.argmax(1)])
    with pytest.raises(ValueError, match="2 images and y 3"): model.fit(images[:2], [0, 1, -1])
    with pytest.raises(ValueError, match="1 class; two are needed"): model.fit(images[:3], [5, 5, -1])
