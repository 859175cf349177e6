"""What a worn style decides where the request does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cinecat.plugins.registry import StyleRegistry
from cinecat.server.errors import RequestError
from cinecat.server.styles import StyleCatalogue
from cinecat.server.validation import AcceptableClip, check_clip
from cinecat.v1 import clip_pb2
from tests.server.samples import model, model_info
from tests.server.style_uploads import toml, weights
from tests.server.test_validation import IMAGE

TABLES = {
    "fast": 'prompt_template = "fast, {prompt}"\n[sampler]\nsteps = 4\nguidance_scale = 2.0\n',
    "slow": 'prompt_template = "{prompt}, slow"\n[sampler]\nsteps = 90\nshift = 5.0\n',
    "worded": 'trigger_words = ["grain", "dust"]\n',
    "long": f'prompt_template = "{"x" * 900} {{prompt}}"\n',
    "endless": "[sampler]\nsteps = 5000\n",
}


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> StyleCatalogue:
    root = tmp_path_factory.mktemp("styles")
    for name, table in TABLES.items():
        (root / name).mkdir()
        (root / name / "style.toml").write_text(toml(name=name) + table)
        (root / name / "dusk.safetensors").write_bytes(weights())
    return StyleCatalogue(StyleRegistry([root]), model_info())


def checked(catalogue: StyleCatalogue, styles: str, **fields: Any) -> AcceptableClip:
    """A clip that wears some styles, "fast slow:0" for instance."""
    clip = clip_pb2.ClipSpec(image=IMAGE, width=64, height=64, frames=5, **fields)
    for style in styles.split():
        name, _, strength = style.partition(":")
        clip.styles.add(name=name, strength=float(strength or 1))
    return check_clip(clip, model(), catalogue)


def test_what_the_request_leaves_open_comes_from_the_style(catalogue: StyleCatalogue) -> None:
    accepted = checked(catalogue, "fast", prompt="a cat")
    clip = accepted.clip
    assert (clip.prompt, clip.steps, clip.guidance_scale, clip.shift) == ("fast, a cat", 4, 2.0, 1.0)
    assert accepted.notes == (
        "steps: 4, from style fast",
        "guidance_scale: 2, from style fast",
        "prompt: in the template of style fast",
    )


def test_the_requests_own_values_win(catalogue: StyleCatalogue) -> None:
    own = {"steps": 7, "guidance_scale": 0.0, "shift": 2.0, "prompt": "a cat", "prompt_as_is": True}
    accepted = checked(catalogue, "fast slow", **own)
    assert {name: getattr(accepted.clip, name) for name in own} == own
    assert accepted.notes == ()


@pytest.mark.parametrize(
    ("styles", "prompt", "steps", "guidance", "shift"),
    [
        ("fast slow", "fast, a cat", 4, 2.0, 5.0),
        ("slow fast", "a cat, slow", 90, 2.0, 5.0),
        ("worded fast", "fast, a cat", 4, 2.0, 1.0),
        ("fast:0 slow", "a cat, slow", 90, 1.0, 5.0),
        ("fast:0 slow:0", "a cat", 8, 1.0, 1.0),
    ],
)
def test_of_styles_that_disagree_the_first_named_decides(
    catalogue: StyleCatalogue, styles: str, prompt: str, steps: int, guidance: float, shift: float
) -> None:
    clip = checked(catalogue, styles, prompt="a cat").clip
    assert (clip.prompt, clip.steps, clip.guidance_scale, clip.shift) == (prompt, steps, guidance, shift)


@pytest.mark.parametrize(
    ("styles", "sent", "used"),
    [
        ("worded", "a cat", "a cat"),
        ("worded", "", "grain, dust"),
        ("fast", "", "fast"),
        ("fast", "a {prompt} cat", "fast, a {prompt} cat"),
        ("worded:0", "", ""),
    ],
)
def test_trigger_words_stand_in_for_an_empty_prompt(
    catalogue: StyleCatalogue, styles: str, sent: str, used: str
) -> None:
    assert checked(catalogue, styles, prompt=sent).clip.prompt == used


def test_asking_for_the_accepted_clip_again_changes_nothing(catalogue: StyleCatalogue) -> None:
    first = checked(catalogue, "fast slow", prompt="a cat").clip
    again = clip_pb2.ClipSpec()
    again.CopyFrom(first)
    again.image = IMAGE
    assert check_clip(again, model(), catalogue).clip == first


def test_a_prompt_that_is_too_long_meets_no_template(
    catalogue: StyleCatalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cinecat.server.validation.apply_style_defaults", None)
    with pytest.raises(RequestError, match=r"clip\.prompt: has 5000 characters, at most 4096"):
        checked(catalogue, "long", prompt="p" * 5000)


def test_a_prompt_that_its_template_makes_too_long_is_refused(catalogue: StyleCatalogue) -> None:
    checked(catalogue, "", prompt="x" * 4096)
    with pytest.raises(RequestError, match=r"clip\.prompt: has 4897 characters with its style's template"):
        checked(catalogue, "long", prompt="x" * 3996)


def test_steps_stay_within_the_servers_limit(catalogue: StyleCatalogue) -> None:
    accepted = checked(catalogue, "endless", prompt="a cat")
    assert accepted.clip.steps == 200
    assert accepted.notes == ("steps: 200, from style endless",)


def test_an_accepted_clip_names_the_weights_it_will_wear(catalogue: StyleCatalogue) -> None:
    style = catalogue.find("fast")
    accepted = checked(catalogue, "fast", prompt="a cat")
    assert accepted.clip.styles[0].fingerprint == style.fingerprint
    assert accepted.weights == {style.fingerprint: style.weights_path}


@pytest.mark.parametrize(
    ("fingerprint", "said"), [("0" * 64, "has the weights"), ("noir", "is not 64 lower-case hexadecimal digits")]
)
def test_weights_that_the_style_does_not_have_are_refused(
    catalogue: StyleCatalogue, fingerprint: str, said: str
) -> None:
    ref = clip_pb2.StyleRef(name="fast", fingerprint=fingerprint)
    with pytest.raises(RequestError, match=said) as refused:
        check_clip(clip_pb2.ClipSpec(image=IMAGE, styles=[ref]), model(), catalogue)
    assert [violation.field for violation in refused.value.violations] == ["clip.styles[0].fingerprint"]


def replaced(root: Path, seed: int) -> None:
    (root / "dusk").mkdir(exist_ok=True)
    (root / "dusk" / "style.toml").write_text(toml())
    (root / "dusk" / "dusk.safetensors").write_bytes(weights(seed))


def test_a_style_that_changed_under_an_accepted_job_is_never_worn_silently(tmp_path: Path) -> None:
    catalogue = StyleCatalogue(StyleRegistry([tmp_path]), model_info())
    replaced(tmp_path, seed=1)
    (accepted,) = checked(catalogue, "dusk", prompt="a cat").clip.styles
    replaced(tmp_path, seed=2)
    with pytest.raises(Exception, match=r"style 'dusk' 1\.0\.0 was replaced since the request was accepted"):
        catalogue.uses([accepted], lambda _: None)
    (use,) = catalogue.uses([accepted], lambda _: tmp_path / "kept")
    assert (use.path, use.fingerprint) == (str(tmp_path / "kept"), accepted.fingerprint)
