// A program of somebody else, built against the installed package.
#include <cidalloc.hpp>
#include <iostream>

int main(int, char** argv) {
  cidalloc::Client cids(argv[1]);
  std::cout << cids.acquire() << "\n";
}
