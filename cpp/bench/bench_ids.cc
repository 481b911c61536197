// What an ID costs: acquire and release at steady state, beside std::mt19937_64 and libuuid.
//
// Prints the nanoseconds of each for one ID: median and minimum of rounds that take turns.
#include <uuid/uuid.h>

#include <algorithm>
#include <chrono>
#include <cidalloc.hpp>
#include <cstdio>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int ROUNDS = 31;
constexpr int CALLS = 100'000;

double nanoseconds_of(const std::function<std::uint64_t()>& call) {
  const auto began = std::chrono::steady_clock::now();
  std::uint64_t sum = 0;
  for (int i = 0; i < CALLS; ++i) sum += call();
  if (sum == 1) std::puts("");  // else the compiler might leave the calls out
  const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - began;
  return took.count() / CALLS;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 3) throw std::invalid_argument("give the URL and the manager");
  cidalloc::Options options;
  options.model = argv[2];  // a manager with a cooldown of 0
  cidalloc::Client client(argv[1], options);
  std::mt19937_64 random(std::random_device{}());
  struct Way {
    const char* name;
    std::function<std::uint64_t()> call;
    std::vector<double> rounds;
  };
  std::vector<Way> ways{
      {"cidalloc acquire + release",
       [&] {
         const auto id = client.acquire();
         client.release(id, cidalloc::ENDED);
         return id;
       },
       {}},
      {"std::mt19937_64", [&] { return random(); }, {}},
      {"libuuid uuid_generate_random",
       [] {
         uuid_t uuid;
         ::uuid_generate_random(uuid);
         return std::uint64_t{uuid[0]};
       },
       {}},
  };
  for (auto& way : ways) (void)nanoseconds_of(way.call);  // warm
  for (int round = 0; round < ROUNDS; ++round) {
    for (auto& way : ways) way.rounds.push_back(nanoseconds_of(way.call));
  }
  for (auto& way : ways) {
    std::sort(way.rounds.begin(), way.rounds.end());
    std::printf("%-30s %8.1f ns median %8.1f ns minimum\n", way.name, way.rounds[ROUNDS / 2],
                way.rounds.front());
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
