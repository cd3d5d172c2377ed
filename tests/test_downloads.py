"Which servers have a file, and which encoders there are: asked in time, and known without torch."
import subprocess
import sys
import time
import urllib.request

import pytest
from servers import check_url_error, strange_server

from finessl.checks import rejects
from finessl.engine import catalogue
from finessl.engine.catalogue import CATALOGUE, encoder_name_error, name_error, speaks_for
from finessl.engine.downloads import require_files, url_error
from finessl.engine.errors import BackboneError, MissingError

clip = "open_clip:ViT-B-16-quickgelu/openai"


def test_url_error():
    check_url_error(url_error)


def test_the_plain_way_is_rejected():
    "It keeps the time where a server is silent, and not where it is slow; and every reason is the same."
    def by_socket(url, seconds):
        request = urllib.request.Request(url, method="HEAD")
        try: return "" if urllib.request.urlopen(request, timeout=seconds).status == 200 else "refused"
        except Exception as error: return str(error)

    def careless(url, seconds): return by_socket(url, seconds) and "offline"
    rejects(check_url_error, by_socket, "/drip took") # 3 seconds instead of 0.3
    rejects(check_url_error, careless, "404 is not named")


def test_two_silent_servers_take_the_time_of_one(tmp_path):
    with strange_server() as at:
        start = time.monotonic()
        with pytest.raises(MissingError, match="2 files are missing"):
            require_files("cifar100", tmp_path, clip, ask=lambda url: url_error(f"{at}/silent", 1.), cache=tmp_path)
        assert 1 <= time.monotonic() - start < 1.9
        require_files("cifar100", tmp_path, clip, ask=lambda url: url_error(f"{at}/200"), cache=tmp_path)


NAMES = {"vit": "no encoder is called 'vit'", "timm:vit_tiny_patch16_244": "'vit_tiny_patch16_224'",
         "timm:vit_tiny_patch16_224.openai": "has no weights", "timm:vgg16": "one of timm's vgg models",
         "open_clip:ViT-B-16/openai": "use 'open_clip:ViT-B-16-quickgelu/openai'",
         "open_clip:EVA02-B-16/merged2b_s8b_b131k": "is an Eva, not a plain ViT",
         "open_clip:ViT-B-16": "names no pretrained weights", "open_clip:ViT-B-16-quickgelu/opnai": "'openai'"}


def test_a_wrong_name_is_refused_before_anything_is_imported():
    "Within two seconds of processor time, in a process of its own."
    code = ("import sys, time; from finessl.engine.downloads import require_files\n"
            "for name in sys.argv[1:]:\n    try: require_files(None, None, name)\n"
            "    except ValueError as error: print(type(error).__name__, error)\n"
            "assert not {'torch', 'timm', 'open_clip', 'numpy'} & set(sys.modules)\n"
            "assert time.process_time() < 2, time.process_time()")
    p = subprocess.run([sys.executable, "-c", code, *NAMES], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    for line, says in zip(p.stdout.splitlines(), NAMES.values(), strict=True):
        assert line.startswith("BackboneError ") and says in line, line


def test_the_catalogue_says_what_the_libraries_say():
    import open_clip, timm
    from finessl.backbone import load_backbone
    from finessl.engine import hub
    assert not speaks_for(CATALOGUE, "timm") and not speaks_for(CATALOGUE, "open_clip") # imported: they are asked
    if hub.hub_table([])["versions"] != CATALOGUE.versions: pytest.skip("written for other versions")
    assert sorted(hub.hub_names()) == sorted((*CATALOGUE.served, *CATALOGUE.refused, *CATALOGUE.without_weights))
    theirs = [n.partition(":")[2] for n in hub.hub_names() if n.startswith("timm:") and "." not in n]
    assert set(timm.list_models()) == {*CATALOGUE.elsewhere, *theirs}
    for name in [n for n in NAMES if ":" in n]:
        with pytest.raises(BackboneError) as error: load_backbone(name)
        assert str(error.value) == name_error(name, CATALOGUE)
    theirs = [n.partition(":")[2] for n in hub.hub_names() if n.startswith("open_clip:") and "/" not in n]
    assert set(open_clip.list_models()) == set(theirs)


def test_other_versions_are_left_to_the_libraries(monkeypatch):
    monkeypatch.setattr(catalogue, "CATALOGUE", CATALOGUE._replace(versions={"timm": "0", "open_clip_torch": "0"}))
    assert encoder_name_error("timm:vit_tiny_patch16_244") == "" and encoder_name_error("vit") != ""
