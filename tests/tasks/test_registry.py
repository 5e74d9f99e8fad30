import pytest

from probekit.tasks.captions import PROMPT
from probekit.tasks.registry import CAPTION_VARIANTS, TASKS, find_caption, find_tasks


def test_files_of_statements_are_tasks_by_the_name_of_the_file(tmp_path):
    folder = tmp_path / "statements"
    folder.mkdir()
    for name in ("swap.csv", "add.jsonl", "notes.txt"):
        (folder / name).write_text("", encoding="utf-8")
    tasks = find_tasks(["caption", "statements"], home=tmp_path)
    assert list(tasks) == ["caption", "add", "swap"]
    assert tasks["caption"] is TASKS["caption"]
    assert tasks["swap"].kind == "binary"
    assert "swap.csv" in tasks["swap"].question


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "tasks=.*: take one or more of caption"),
        (["riddle"], r"unknown tasks .'riddle'.*or a file of statements"),
        (["caption", "caption"], "two tasks of the name 'caption'"),
        (["caption.csv"], "two tasks of the name 'caption'"),
        (["swap.csv", "folder"], "two tasks of the name 'swap'"),
    ],
)
def test_names_that_clash_or_are_unknown_are_refused(tmp_path, names, message):
    (tmp_path / "folder").mkdir()
    for name in ("caption.csv", "swap.csv", "folder/swap.json"):
        (tmp_path / name).write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        find_tasks(names, home=tmp_path)


def test_the_caption_of_a_prompt_is_found_in_all_wordings_and_in_no_other_prompt():
    caption = "A dog.\nIs this right? It is"
    templates = [PROMPT, *(variant.prompt for variant in CAPTION_VARIANTS.values())]
    for template in templates:
        assert find_caption(template.format(caption=caption)) == caption
    assert find_caption("This image contains the following types of object: dog, cup") is None
