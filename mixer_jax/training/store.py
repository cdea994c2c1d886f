"""Short values that all processes of a run read and write."""

from typing import Any

_FOLDER = "mixer_jax/"


class Store:
    """The key-value store of JAX's coordination service, which process 0 serves.

    It works between processes that have other devices or programs, where a collective
    would hang. Its methods raise JaxRuntimeError if process 0 does not answer.
    """

    def __init__(self, client: Any):
        """Uses the `client` of the coordination service."""
        self._client = client

    def write(self, key: str, value: str) -> None:
        """Writes a value, also over an older one."""
        self._client.key_value_set(_FOLDER + key, value, allow_overwrite=True)

    def read(self, folder: str) -> dict[int, str]:
        """Returns the values of a folder such as "alive/", by process."""
        found = self._client.key_value_dir_get(_FOLDER + folder)
        return {int(k.removeprefix(_FOLDER + folder)): value for k, value in found}
