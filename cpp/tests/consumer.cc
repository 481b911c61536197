// A program of somebody else, built against the installed package.
#include <cidalloc.hpp>
#include <cstdio>
#include <exception>

int main(int count, char** arguments) try {
  if (count != 2) return 2;
  cidalloc::Client cids(arguments[1]);
  std::printf("%llu\n", static_cast<unsigned long long>(cids.acquire()));
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
