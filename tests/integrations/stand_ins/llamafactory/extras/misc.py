import os


def find_available_port() -> int:
    return 12345


def get_device_count() -> int:
    return int(os.getenv("DEVICES", "1"))


def is_env_enabled(name: str, default: str = "0") -> bool:
    return os.getenv(name, default).lower() in ("true", "y", "1")


def use_kt() -> bool:
    return is_env_enabled("USE_KT")


def use_ray() -> bool:
    return is_env_enabled("USE_RAY")
