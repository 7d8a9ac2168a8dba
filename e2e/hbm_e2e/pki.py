"""Keys and certificates of one cluster, and the kubeconfigs that carry them."""

import base64
import json
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hbm_e2e.errors import HarnessError

DAYS = "30"


@dataclass(frozen=True)
class KeyPair:
    certificate: Path
    key: Path


class Pki:
    """Two authorities (clients and servers; the aggregation front proxy) and what they sign.

    A pair that exists is kept, so that a restarted part finds the identity it had.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._one_at_a_time = threading.Lock()
        self.ca = self._authority("ca")
        self.front_proxy_ca = self._authority("front-proxy-ca")

    def issue(
        self,
        name: str,
        subject: str,
        alternative_names: Sequence[str] = (),
        authority: KeyPair | None = None,
    ) -> KeyPair:
        """A certificate for servers and clients alike; `subject` such as `/O=group/CN=user`."""
        pair = self._pair(name)
        with self._one_at_a_time:
            if pair.certificate.exists():
                return pair
            signer = authority or self.ca
            names = ",".join(alternative_names) or f"DNS:{name}"
            self._openssl(
                *_request(pair, subject),
                *("-CA", str(signer.certificate), "-CAkey", str(signer.key)),
                *("-addext", f"subjectAltName={names}"),
                *("-addext", "basicConstraints=critical,CA:FALSE"),
                *("-addext", "keyUsage=critical,digitalSignature,keyEncipherment"),
                *("-addext", "extendedKeyUsage=serverAuth,clientAuth"),
            )
            return pair

    def service_account_key(self) -> Path:
        """The private key that signs service account tokens; its public half lies beside it."""
        key = self.folder / "service-account.key"
        if not key.exists():
            self._openssl("genpkey", "-algorithm", "RSA", "-out", str(key))
            self._openssl("pkey", "-in", str(key), "-pubout", "-out", str(key.with_suffix(".pub")))
        return key

    def kubeconfig(self, path: Path, server: str, user: KeyPair) -> Path:
        """Write a self-contained kubeconfig (JSON is YAML), readable by its owner only."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "e2e",
                    "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": "e2e"}}],
                    "clusters": [
                        {
                            "name": "e2e",
                            "cluster": {
                                "server": server,
                                "certificate-authority-data": _base64(self.ca.certificate),
                            },
                        }
                    ],
                    "users": [
                        {
                            "name": "e2e",
                            "user": {
                                "client-certificate-data": _base64(user.certificate),
                                "client-key-data": _base64(user.key),
                            },
                        }
                    ],
                },
                indent=1,
            )
        )
        return path

    def _authority(self, name: str) -> KeyPair:
        pair = self._pair(name)
        if not pair.certificate.exists():
            self._openssl(
                *_request(pair, f"/CN={name}"),
                *("-addext", "basicConstraints=critical,CA:TRUE"),
                *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
            )
        return pair

    def _pair(self, name: str) -> KeyPair:
        return KeyPair(self.folder / f"{name}.crt", self.folder / f"{name}.key")

    def _openssl(self, *words: str) -> None:
        try:
            result = subprocess.run(
                ["openssl", *words], capture_output=True, text=True, check=False
            )
        except FileNotFoundError as error:
            raise HarnessError("needs the program openssl: install Debian's openssl") from error
        if result.returncode:
            raise HarnessError(f"openssl {words[0]} failed: {result.stderr.strip()}")


def _request(pair: KeyPair, subject: str) -> list[str]:
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    files = ["-keyout", str(pair.key), "-out", str(pair.certificate)]
    return ["req", "-x509", "-days", DAYS, "-subj", subject, *curve, *files]


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
