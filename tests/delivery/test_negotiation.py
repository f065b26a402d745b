import pytest

from app.delivery.negotiation import accepts


@pytest.mark.parametrize(
    "headers",
    [
        ["image/webp"],
        ["IMAGE/WebP"],
        ["image/avif,image/webp,*/*;q=0.8"],
        ["image/png , image/webp ; q=0.001"],
        ["image/webp;q=1.0"],
        ["image/webp;q=0.5;ext=1"],
        ["image/png", "image/webp"],
    ],
)
def test_a_type_named_anywhere_is_accepted(headers: list[str]) -> None:
    assert accepts(headers, "image/webp")


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        ["*/*"],
        ["image/*"],
        ["image/webpx"],
        ["ximage/webp"],
        ["image/webp;q=0"],
        ["image/webp ; Q=0.000"],
        [",;,;=,"],
        ["text/html;note=image/webp"],
    ],
)
def test_a_type_that_is_not_named_or_refused_is_not_accepted(headers: list[str]) -> None:
    assert not accepts(headers, "image/webp")
