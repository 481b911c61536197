"""A request to an iterative model, which is a whole sequence.

Start a server for it: ``cidalloc serve --repository examples/iterative/models``.
"""

import argparse

from cidalloc.client import Client


def main():
    options = argparse.ArgumentParser()
    options.add_argument("-u", "--url", default="localhost:8001")
    url = options.parse_args().url

    with Client(url) as cids:
        for number in (6, 7):
            with cids.sequence("collatz") as sequence:
                results = sequence.stream({"NUMBER": number})
                print(number, *(result["NEXT"][0, 0] for result in results))


if __name__ == "__main__":
    main()
