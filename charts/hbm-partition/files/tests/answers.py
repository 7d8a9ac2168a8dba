"""Expects an answer from each address given: NAME=STATUS=URL, where STATUS may be `any`."""

import sys
import time
import urllib.error
import urllib.request

deadline = time.monotonic() + 90
for check in sys.argv[1:]:
    name, wanted, url = check.split("=", 2)
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                seen = str(answer.status)
        except urllib.error.HTTPError as error:
            seen = str(error.code)
        except OSError as error:
            seen = f"no answer ({error})"
        if seen == wanted or (wanted == "any" and seen.isdigit()):
            print(f"{name}: {seen}")
            break
        if time.monotonic() > deadline:
            sys.exit(f"{name}: {url} says {seen}, not {wanted}")
        time.sleep(2)
