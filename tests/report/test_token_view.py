from PIL import Image

from probekit.models.load import load_skeleton
from probekit.report.token_view import token_runs, token_view


def test_the_tokens_are_those_that_the_model_gets_and_the_images_are_one_run():
    image = Image.new("RGB", (128, 96), "red")
    processors = {}
    for model in ("tiny-qwen2-vl", "tiny-fast-vlm"):
        vlm = load_skeleton(model, with_processor=True).vlm
        prepared = vlm.prompt_processor.prepare(image, ["<b>A dog.</b>"])
        runs = token_runs(vlm.prompt_processor, image, "<b>A dog.</b>")
        assert sum(run.length for run in runs) == len(prepared.tokens[0]["input_ids"])
        (of_image,) = [run for run in runs if run.is_image]
        assert of_image.length == prepared.image_masks[0].sum() > 1
        written = "".join(run.text for run in runs if not run.is_image)
        assert "<b>A dog.</b>" in written
        processors[model] = vlm.prompt_processor
    html = token_view(processors, image, "<b>A dog.</b>").data
    assert "<b>" not in html
    assert html.count('class="image"') == 2
    assert html.count("<img") == 1
