"""Which transformations a URL can ask for, and in which of its parts."""

import pytest

from tests import pictures
from tests.delivery.support import image_of, is_refused, put, visit, with_transformation
from tests.server import LoupeServer

NAMES = ["n-ik_ml_thumbnail", "n-media_library_thumbnail"]


@pytest.fixture(scope="module")
def url(shared_server: LoupeServer) -> str:
    """Of a picture two folders deep, larger than a thumbnail."""
    return str(put(shared_server, pictures.jpeg(600, 400), folder="/transformations/deep")["url"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "form",
    [
        lambda url, name: with_transformation(url, name),
        lambda url, name: url.replace("/deep/", f"/tr:{name}/deep/"),
        lambda url, name: url.replace("/deep/", f"/deep/tr:{name}/"),
        lambda url, name: with_transformation(url, name).replace("tr:", "tr%3A"),
        lambda url, name: f"{url}?tr={name}",
        lambda url, name: f"{url}?updatedAt=1699999999999&tr={name}",
        lambda url, name: f"{url}?tr={name.replace('_', '%5F')}&updatedAt=5",
    ],
    ids=["path", "deeper", "deepest", "encoded", "query", "after updatedAt", "encoded query"],
)
def test_a_named_thumbnail_may_stand_in_the_path_or_the_query(
    url: str, name: str, form: object
) -> None:
    assert callable(form)
    image = image_of(visit(form(url, name)))
    assert (image.width, image.height) == (300, 200)


UNSUPPORTED = [
    "w-300",
    "w-300,h-200",
    "w-300%2Ch-200",
    "n-unknown",
    "n-IK_ML_thumbnail",
    "n-",
    "n-ik_ml_thumbnail:rt-90",
    "n-ik_ml_thumbnail,w-5",
    "w-400:n-ik_ml_thumbnail",
    "orig-true",
    "l-text,i-hello,l-end",
    "%E7%8C%AB",
    "'%3Cscript%3E",
    "x" * 5000,
]


@pytest.mark.parametrize("transformation", UNSUPPORTED, ids=lambda text: text[:20])
@pytest.mark.parametrize("in_path", [True, False], ids=["path", "query"])
def test_another_transformation_is_400_and_names_what_is_supported(
    url: str, transformation: str, in_path: bool
) -> None:
    target = with_transformation(url, transformation) if in_path else f"{url}?tr={transformation}"
    answer = visit(target)
    assert is_refused(answer, 400)
    assert len(answer.content) < 1000
    for name in NAMES:
        assert name in answer.json()["message"]


def test_the_message_repeats_what_was_asked_for(url: str) -> None:
    assert "'w-300,h-200'" in visit(f"{url}?tr=w-300,h-200").json()["message"]


def test_two_transformations_in_one_url_are_400(url: str) -> None:
    twice = with_transformation(with_transformation(url, NAMES[0]), NAMES[1])
    assert is_refused(visit(twice), 400)
    assert is_refused(visit(f"{with_transformation(url, 'w-5')}?tr={NAMES[0]}"), 400)


def test_no_transformation_in_the_query_is_the_file_itself(url: str) -> None:
    assert visit(f"{url}?tr=").content == pictures.jpeg(600, 400)


def test_an_unsupported_transformation_does_not_tell_whether_the_file_exists(
    shared_server: LoupeServer,
) -> None:
    private = put(shared_server, isPrivateFile="true")["url"]
    answers = [
        visit(with_transformation(target, "w-300"))
        for target in (private, f"{shared_server.url}/demo/unknown.jpg")
    ]
    assert answers[0].status_code == answers[1].status_code == 400
    assert answers[0].json() == answers[1].json()
