from sepme_cli.diffusion.tokenizer import END, START, tokenize


def test_ids_are_clips() -> None:
    # "a photo of a cat" as CLIP's own tokenizer gives it.
    expected = [START, 320, 1125, 539, 320, 2368, END]
    assert tokenize(["a photo of a cat"], 7).tolist() == [expected]


def test_short_prompts_are_padded_and_long_ones_cut_before_the_end() -> None:
    short, long, empty = tokenize(["cat", "cat " * 50, ""], 6).tolist()
    assert short == [START, 2368, END, END, END, END]
    assert long == [START, 2368, 2368, 2368, 2368, END]
    assert empty == [START, END, END, END, END, END]


def test_sd_2_pads_with_zero() -> None:
    assert tokenize(["cat"], 5, padding=0).tolist() == [[START, 2368, END, 0, 0]]


def test_no_prompts_are_no_rows() -> None:
    assert tokenize([], 5).shape == (0, 5)
