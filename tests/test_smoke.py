import json
from pathlib import Path

from tests.conftest import Serve
from tests.emulators.receiver import Receiver
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.vision import VisionEmulator


def test_it_works(serve: Serve, vision: VisionEmulator, rekognition: RekognitionEmulator) -> None:
    server = serve(
        google_auto_tagging="vision", aws_auto_tagging="rekognition", sync_budget_seconds=0.5
    )
    rekognition.hold()
    with Receiver() as receiver:
        ext = json.dumps(
            [
                {"name": n, "minConfidence": 5, "maxTags": 3}
                for n in ("google-auto-tagging", "aws-auto-tagging")
            ]
        )
        answer = server.upload(
            Path("demo/sample.jpg").read_bytes(), extensions=ext, webhookUrl=receiver.url
        )
        print(answer.json())
        assert answer.json()["extensionStatus"] == {
            "google-auto-tagging": "success",
            "aws-auto-tagging": "pending",
        }
        rekognition.release()
        [got] = receiver.wait_for(1)
        print(got.json())
        assert (
            server.details(answer.json()["fileId"])["extensionStatus"]["aws-auto-tagging"]
            == "success"
        )
        assert (
            server.client.patch(
                f"/v1/files/{answer.json()['fileId']}/details",
                json={"removeAITags": "all", "tags": ["a"]},
            ).json()["AITags"]
            is None
        )
        assert len(server.client.get("/v1/files", params={"tags": "a,b"}).json()) == 1
        d = server.details(answer.json()["fileId"])
        import httpx

        assert httpx.get(d["url"]).status_code == 200
        assert httpx.get(d["thumbnail"]).headers["content-type"] == "image/jpeg"
        assert server.client.delete(f"/v1/files/{d['fileId']}").status_code == 204
        assert httpx.get(d["url"]).status_code == 404
