"""schemathesis: requests made from our own /openapi.json, good and bad."""

import pathlib
import subprocess
import sys


def main(url):
    # What one field demands of another, and the size of the vocabulary, are not in the
    # description, so that good data by its words may still be refused.
    command = [
        *(pathlib.Path(sys.executable).with_name("schemathesis"), "run"),
        *(f"{url}/openapi.json", "--max-examples", "20", "--checks", "all"),
        *("--exclude-checks", "positive_data_acceptance", "--request-timeout", "30"),
        *("--no-color", "--warnings", "off"),
    ]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
