from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cinecat.plugins import registry as registry_module
from cinecat.plugins.lora import inspect_lora
from cinecat.plugins.registry import StyleRegistry, UnknownStyle
from tests.plugins.samples import TARGETS, random_factors, write_lora, write_style


@pytest.fixture
def registry(tmp_path: Path) -> StyleRegistry:
    return StyleRegistry([tmp_path])


def _listed(registry: StyleRegistry) -> list[tuple[str, str]]:
    return [(style.manifest.name, style.manifest.version) for style in registry.styles()]


def test_no_folder_is_no_style_and_no_problem(tmp_path: Path) -> None:
    registry = StyleRegistry([tmp_path / "absent"])

    assert (registry.styles(), registry.problems()) == ((), ())


def test_a_style_carries_what_its_folder_says(tmp_path: Path, registry: StyleRegistry) -> None:
    folder = write_style(tmp_path / "any-name")

    (style,) = registry.styles()

    assert (style.folder, style.weights_path) == (folder, folder / "sepia.safetensors")
    assert style.header == inspect_lora(style.weights_path)
    assert style.fingerprint == hashlib.sha256(style.weights_path.read_bytes()).hexdigest()


def test_a_new_folder_is_found_without_a_restart(tmp_path: Path, registry: StyleRegistry) -> None:
    assert registry.styles() == ()

    write_style(tmp_path / "sepia")

    assert _listed(registry) == [("sepia", "1.0.0")]


def test_a_removed_folder_is_gone_at_the_next_call(tmp_path: Path, registry: StyleRegistry) -> None:
    folder = write_style(tmp_path / "sepia")
    assert _listed(registry) == [("sepia", "1.0.0")]

    shutil.rmtree(folder)

    assert (registry.styles(), registry.problems()) == ((), ())


def test_styles_are_listed_by_name_then_newest_version_first(tmp_path: Path, registry: StyleRegistry) -> None:
    for name, version in [("sepia", "1.9.0"), ("sepia", "1.10.0"), ("amber", "1.0.0"), ("sepia", "0.11.0")]:
        write_style(tmp_path / f"{name}-{version}", name=name, version=version)

    assert _listed(registry) == [("amber", "1.0.0"), ("sepia", "1.10.0"), ("sepia", "1.9.0"), ("sepia", "0.11.0")]


def test_replaced_weights_have_a_new_fingerprint(tmp_path: Path, registry: StyleRegistry) -> None:
    write_style(tmp_path / "sepia", seed=1)
    before = registry.find("sepia").fingerprint

    write_style(tmp_path / "sepia", seed=2)

    assert registry.find("sepia").fingerprint != before


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled as soon as they are written."""
    monkeypatch.setattr(registry_module, "_UNSETTLED_NS", 0)


@pytest.mark.usefixtures("settled")
def test_weights_replaced_under_the_same_time_and_size_have_a_new_fingerprint(
    tmp_path: Path, registry: StyleRegistry
) -> None:
    weights = write_style(tmp_path / "sepia", seed=1) / "sepia.safetensors"
    times = weights.stat()
    before = registry.find("sepia").fingerprint

    time.sleep(0.05)  # past the tick of the kernel's clock
    other = write_style(tmp_path / ".other", seed=2) / "sepia.safetensors"
    weights.write_bytes(other.read_bytes())
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))

    assert registry.find("sepia").fingerprint != before


def test_a_file_that_changed_just_now_is_not_trusted_to_show_its_next_change(
    tmp_path: Path, registry: StyleRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time_ns()
    monkeypatch.setattr(registry_module, "_signature", lambda path: (1, 1, now, now, 1))
    write_style(tmp_path / "sepia", seed=1)
    before = registry.find("sepia").fingerprint

    write_style(tmp_path / "sepia", seed=2)

    assert registry.find("sepia").fingerprint != before


def test_an_edited_manifest_is_read_again(tmp_path: Path, registry: StyleRegistry) -> None:
    write_style(tmp_path / "sepia", title="Sepia")
    assert registry.find("sepia").manifest.title == "Sepia"

    write_style(tmp_path / "sepia", title="Sepia, warmer")

    assert registry.find("sepia").manifest.title == "Sepia, warmer"


@pytest.mark.usefixtures("settled")
def test_nothing_is_read_when_nothing_changed(
    tmp_path: Path, registry: StyleRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_style(tmp_path / "sepia")
    write_style(tmp_path / "wrong", name="wrong", sha256="0" * 64)
    first = (registry.styles(), registry.problems())
    monkeypatch.delattr(registry_module, "read_manifest")
    monkeypatch.delattr(registry_module, "inspect_lora")

    assert (registry.styles(), registry.problems()) == first


@pytest.mark.usefixtures("settled")
def test_another_link_to_the_weights_is_no_reason_to_read_them_again(
    tmp_path: Path, registry: StyleRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = write_style(tmp_path / "sepia") / "sepia.safetensors"
    before = registry.styles()
    monkeypatch.delattr(registry_module, "inspect_lora")

    time.sleep(0.05)  # past the tick of the kernel's clock
    os.link(weights, tmp_path / "kept")
    assert registry.styles() == before
    time.sleep(0.05)
    (tmp_path / "kept").unlink()
    assert registry.styles() == before


@pytest.mark.usefixtures("settled")
def test_a_preview_that_goes_is_noticed(tmp_path: Path, registry: StyleRegistry) -> None:
    folder = write_style(tmp_path / "sepia", preview="sepia.png")
    (folder / "sepia.png").write_bytes(b"a picture")
    assert _listed(registry) == [("sepia", "1.0.0")]

    (folder / "sepia.png").unlink()
    assert [problem.folder for problem in registry.problems()] == [folder]


def test_a_half_written_style_is_a_problem_until_it_is_whole(tmp_path: Path, registry: StyleRegistry) -> None:
    weights = write_style(tmp_path / "sepia") / "sepia.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])

    assert registry.styles() == ()
    (problem,) = registry.problems()
    assert problem.folder == tmp_path / "sepia"
    assert problem.reason.startswith("sepia.safetensors: it is truncated")

    weights.write_bytes(whole)

    assert _listed(registry) == [("sepia", "1.0.0")]
    assert registry.problems() == ()


@pytest.mark.usefixtures("settled")
def test_weights_that_arrive_after_the_manifest_are_found(tmp_path: Path, registry: StyleRegistry) -> None:
    weights = write_style(tmp_path / "sepia") / "sepia.safetensors"
    weights.rename(tmp_path / "later.safetensors")
    (problem,) = registry.problems()
    assert "there is no file 'sepia.safetensors'" in problem.reason

    (tmp_path / "later.safetensors").rename(weights)

    assert _listed(registry) == [("sepia", "1.0.0")]


def test_a_right_checksum_is_accepted_in_either_case(tmp_path: Path, registry: StyleRegistry) -> None:
    weights = write_style(tmp_path / "sepia") / "sepia.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()

    write_style(tmp_path / "sepia", sha256=digest.upper())

    assert registry.find("sepia").fingerprint == digest


def test_a_wrong_checksum_is_a_problem(tmp_path: Path, registry: StyleRegistry) -> None:
    write_style(tmp_path / "sepia", sha256="0" * 64)

    (problem,) = registry.problems()
    assert "sha256 is 000000000000..., but sepia.safetensors has" in problem.reason
    assert registry.styles() == ()


def test_of_two_folders_with_one_name_and_version_the_first_wins(tmp_path: Path) -> None:
    own = write_style(tmp_path / "own" / "z", seed=1)
    other = write_style(tmp_path / "bundled" / "a", seed=2)

    registry = StyleRegistry([tmp_path / "own", tmp_path / "bundled"])

    assert [style.folder for style in registry.styles()] == [own]
    (problem,) = registry.problems()
    assert problem.folder == other
    assert f"sepia 1.0.0 is already offered by {own}" in problem.reason


def test_the_second_of_two_duplicates_takes_over_when_the_first_goes(tmp_path: Path, registry: StyleRegistry) -> None:
    first, second = write_style(tmp_path / "a"), write_style(tmp_path / "b")
    assert registry.find("sepia").folder == first

    shutil.rmtree(first)

    assert registry.find("sepia").folder == second
    assert registry.problems() == ()


def test_a_broken_folder_does_not_hide_the_good_ones(tmp_path: Path, registry: StyleRegistry) -> None:
    write_style(tmp_path / "good")
    write_style(tmp_path / "broken", name="Broken!")
    (tmp_path / "loose.txt").write_text("not a folder")
    (tmp_path / "empty").mkdir()
    write_style(tmp_path / ".being-installed", name="soon")

    assert _listed(registry) == [("sepia", "1.0.0")]
    assert [problem.folder.name for problem in registry.problems()] == ["broken"]


def test_a_styles_folder_that_is_a_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "styles").write_text("")

    (problem,) = StyleRegistry([tmp_path / "styles"]).problems()

    assert "cannot be listed (Not a directory)" in problem.reason


def test_find_gives_the_newest_version_unless_told(tmp_path: Path, registry: StyleRegistry) -> None:
    write_style(tmp_path / "old", version="1.2.0")
    write_style(tmp_path / "new", version="1.10.0")

    assert registry.find("sepia").manifest.version == "1.10.0"
    assert registry.find("sepia", "1.2.0").manifest.version == "1.2.0"


def test_an_unknown_name_is_answered_with_the_near_miss_and_the_names(tmp_path: Path, registry: StyleRegistry) -> None:
    write_style(tmp_path / "sepia")
    write_style(tmp_path / "amber", name="amber")

    with pytest.raises(UnknownStyle) as caught:
        registry.find("sepai")

    assert (caught.value.names, caught.value.near_miss) == (("amber", "sepia"), "sepia")
    assert f"{caught.value}" == "no style 'sepai'; did you mean sepia? there are amber, sepia"


def test_an_unknown_version_is_answered_with_those_there_are(tmp_path: Path, registry: StyleRegistry) -> None:
    write_style(tmp_path / "old", version="1.2.0")
    write_style(tmp_path / "new", version="1.10.0")

    with pytest.raises(UnknownStyle, match=r"'sepia' has no version '2\.0\.0'; it has 1\.10\.0, 1\.2\.0"):
        registry.find("sepia", "2.0.0")


def test_asking_for_a_style_whose_folder_is_broken_says_why(tmp_path: Path, registry: StyleRegistry) -> None:
    write_style(tmp_path / "sepia", version="one")

    with pytest.raises(UnknownStyle, match=r"of that name cannot be offered: style\.toml: version is 'one'"):
        registry.find("sepia")


def test_asking_when_there_are_none_says_so(registry: StyleRegistry) -> None:
    with pytest.raises(UnknownStyle, match="no style 'sepia'; no style is installed"):
        registry.find("sepia")


def test_an_unknown_style_error_crosses_processes(registry: StyleRegistry) -> None:
    with pytest.raises(UnknownStyle) as caught:
        registry.find("sepia")

    assert f"{pickle.loads(pickle.dumps(caught.value))}" == f"{caught.value}"


def test_threads_see_whole_styles_while_folders_change(tmp_path: Path, registry: StyleRegistry) -> None:
    write_style(tmp_path / "sepia")
    staged = tmp_path / ".staged.safetensors"

    def replace(seed: int) -> None:
        write_lora(staged, {TARGETS[0]: random_factors(4, seed=seed)})
        staged.replace(tmp_path / "sepia" / "sepia.safetensors")

    with ThreadPoolExecutor(4) as pool:
        listings = [pool.submit(registry.styles) for _ in range(60)]
        pool.submit(lambda: [replace(seed) for seed in range(20)]).result()
        listings += [pool.submit(registry.styles) for _ in range(60)]

    assert {len(listing.result()) for listing in listings} == {1}
    assert registry.problems() == ()
