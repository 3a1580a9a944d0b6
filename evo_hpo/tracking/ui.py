"""placeholder"""


def launch_ui(tracking_uri: str | None = None, port: int = 5000) -> None:
    raise NotImplementedError
