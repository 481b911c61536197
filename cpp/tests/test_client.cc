// The client in C++ with the real manager, without faults.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <set>
#include <type_traits>

#include "proxy.hpp"
#include "server.hpp"

using cidalloc::Client;
using cidalloc::Code;
using cidalloc::Ids;

namespace {

/// What the manager says of the only open session with this label; null if there is none.
nlohmann::json session_of(const Client& client, const std::string& label) {
  const auto status = client.status();
  for (const auto& each : status["sessions"]) {
    if (each["label"] == label) return each;
  }
  return nullptr;
}

}  // namespace

TEST_CASE("IDs are acquired and released, and the manager knows it") {
  auto options = of();
  options.label = "first";
  Client client(server_url(), options);
  auto ids = client.acquire_many(5);
  ids.push_back(client.acquire());
  CHECK(std::set<cidalloc::Id>(ids.begin(), ids.end()).size() == 6);
  std::sort(ids.begin(), ids.end());
  CHECK(client.held() == ids);
  CHECK(session_of(client, "first")["held"] >= 6);
  client.release(ids.back());
  ids.pop_back();
  client.release_many(ids, 1s);
  CHECK(client.held().empty());
  CHECK(eventually([&] { return session_of(client, "first")["held"] < 6; }));
  const Client other(server_url(), of());
  client.close();
  CHECK(session_of(other, "first").is_null());
}

TEST_CASE("Calls that are wrong change nothing") {
  Client client(server_url(), of());
  const auto one = client.acquire();
  CHECK(code_of([&] { client.release(one + 90'000); }) == Code::NOT_HELD);
  CHECK(code_of([&] { client.release_many({one, one}); }) == Code::DUPLICATE);
  CHECK(code_of([&] { client.release(one, -3ms); }) == Code::INVALID_ARGUMENT);
  CHECK(code_of([&] { client.acquire_many(0); }) == Code::INVALID_ARGUMENT);
  CHECK(code_of([&] { client.acquire_many(1'000'000); }) == Code::LIMIT_EXCEEDED);
  CHECK(code_of([&] { Client("ftp://127.0.0.1"); }) == Code::INVALID_ARGUMENT);
  CHECK(code_of([&] { Client("http://127.0.0.1", of("quick", 0ms)); }) == Code::INVALID_ARGUMENT);
  CHECK(code_of([&] { Client(server_url(), of("quick", 1h)).acquire(); }) == Code::LIMIT_EXCEEDED);
  CHECK(client.held() == Ids{one});
  client.close();
  client.close();
  CHECK(code_of([&] { client.acquire(); }) == Code::INVALID_ARGUMENT);
  CHECK(code_of([&] { client.release(one); }) == Code::INVALID_ARGUMENT);
  CHECK(client.held().empty());
}

TEST_CASE("An exhausted pool fails at once, and all IDs come back") {
  auto options = of("pair");
  Client client(server_url(), options);
  const auto both = client.acquire_many(2);
  Client other(server_url(), options);
  std::string text;
  CHECK(code_of([&] { other.acquire(); }, &text) == Code::EXHAUSTED);
  CHECK(text.rfind("EXHAUSTED: ", 0) == 0);
  client.release_many(both, cidalloc::ENDED);
  client.close();
  CHECK(other.acquire_many(2).size() == 2);
}

TEST_CASE("The ID cache spares round trips") {
  Proxy proxy(server_port());
  Client client(proxy.url(), of());
  for (int i = 0; i < 2000; ++i) client.release(client.acquire(), cidalloc::ENDED);
  CHECK(proxy.seen().size() < 10);
  const auto before = proxy.seen().size();
  auto options = of();
  options.ahead = 0;
  Client without(proxy.url(), options);
  for (int i = 0; i < 5; ++i) without.release(without.acquire(), cidalloc::ENDED);
  CHECK(proxy.seen().size() >= before + 6);
}

TEST_CASE("A sequence adds up, and its ID is used again after END") {
  Client client(server_url(), of());
  auto sequence = client.sequence("simple_sequence");
  int sum = 0;
  for (int value = 1; value <= 4; ++value) {
    auto request = sequence.next(value == 4);
    CHECK(request.id() == sequence.id());
    CHECK(request.start() == (value == 1));
    CHECK(request.end() == (value == 4));
    CHECK(request.timeout() == 1min);
    sum += value;
    CHECK(add(request, value) == sum);
  }
  CHECK(client.held().empty());
  CHECK(code_of([&] { sequence.next(); }) == Code::INVALID_ARGUMENT);
  auto next = client.sequence("simple_sequence");
  CHECK(next.id() == sequence.id());
  CHECK(next.key() != sequence.key());
  CHECK(next.headers().empty());
}

TEST_CASE("A sequence with a request in doubt is not released as ended") {
  Client client(server_url(), of());
  const auto released = [&](const char* how) {
    return client.status()["released"][how].get<int>();
  };
  const auto ended = released("ended");
  const auto cooled = released("cooled");
  {
    auto sequence = client.sequence("simple_sequence");
    { auto failed = sequence.next(); }
    auto again = sequence.next();
    CHECK(again.start());
    CHECK(add(again, 3) == 3);
    auto last = sequence.next(true);
    CHECK(add(last, 4) == 7);
    CHECK(client.held() == Ids{sequence.id()});
  }
  {
    auto unfinished = client.sequence("simple_sequence");
    auto request = unfinished.next();
    CHECK(add(request, 1) == 1);
  }
  CHECK(client.held().empty());
  CHECK(eventually([&] { return released("cooled") == cooled + 2; }));
  CHECK(released("ended") == ended);
  { auto unused = client.sequence("simple_sequence"); }
  CHECK(released("cooled") == cooled + 2);
}

TEST_CASE("END that failed can be sent again, and pipelined requests have one START") {
  Client client(server_url(), of());
  auto sequence = client.sequence("", {1s, 1s});
  auto first = sequence.next();
  auto second = sequence.next();
  CHECK((first.start() && !second.start()));
  second.answered();
  first.answered();
  first.answered();
  { auto failed = sequence.next(true); }
  auto last = sequence.next(true);
  CHECK(!last.start());
  CHECK(code_of([&] { sequence.next(); }) == Code::INVALID_ARGUMENT);
  last.answered();
  sequence.close();
  sequence.close();
  CHECK(client.held().empty());
}

TEST_CASE("What the model forgot is not sent, and models that do not fit are refused") {
  Client client(server_url(), of());
  auto sequence = client.sequence("idle_sequence");
  auto request = sequence.next();
  CHECK(add(request, 5, "idle_sequence") == 5);
  std::this_thread::sleep_for(900ms);
  CHECK(code_of([&] { sequence.next(); }) == Code::SEQUENCE_LOST);
  CHECK(code_of([&] { (void)client.sequence("quick"); }) == Code::INVALID_ARGUMENT);
  CHECK(code_of([&] { (void)client.sequence("no such model"); }) == Code::UNAVAILABLE);
  CHECK(code_of([&] { (void)client.sequence("", {0s, 1s}); }) == Code::INVALID_ARGUMENT);
  { auto narrow = client.sequence("narrow_sequence"); }
  Client wide(server_url(), of("wide"));
  CHECK(code_of([&] { (void)wide.sequence("narrow_sequence"); }) == Code::INVALID_ARGUMENT);
  CHECK(wide.held().empty());
}

TEST_CASE("The session announces the models of its sequences") {
  Proxy proxy(server_port());
  Client client(proxy.url(), of());
  auto sequence = client.sequence("simple_sequence");
  CHECK(eventually([&] {
    const auto seen = proxy.seen();
    return std::any_of(seen.begin(), seen.end(), [](const std::string& each) {
      return each.find(R"("models":"[\"simple_sequence\"]")") != std::string::npos;
    });
  }));
}

TEST_CASE("A session of a slice carries it with all requests but OPEN") {
  Proxy proxy(server_port());
  {
    Client client(proxy.url(), of("sliced"));
    auto sequence = client.sequence("simple_sequence");
    CHECK(sequence.headers() == std::map<std::string, std::string>{{"cid-slice", "3"}});
    (void)client.status();
  }
  for (const auto& each : proxy.seen()) {
    const bool before = Proxy::operation(each) == 5 || each.rfind("GET", 0) == 0;
    CHECK((each.find("cid-slice: 3\r\n") == std::string::npos) == before);
  }
}

TEST_CASE("Requests carry the stamp of the latest answer") {
  Proxy proxy(server_port());
  std::vector<std::string> stamps;
  {
    Client client(proxy.url(), of());
    client.release(client.acquire(), cidalloc::ENDED);
  }
  for (const auto& each : proxy.seen()) {
    const std::string name = R"("seen":")";
    const auto at = each.find(name);
    REQUIRE(at != std::string::npos);
    stamps.push_back(
        each.substr(at + name.size(), each.find('"', at + name.size()) - at - name.size()));
  }
  REQUIRE(stamps.size() > 1);
  CHECK(stamps.front().empty());  // of OPEN
  CHECK(stamps.back().size() == cidalloc::protocol::STAMP_DIGITS);
  CHECK(std::is_sorted(stamps.begin(), stamps.end()));
}

TEST_CASE("64 threads share a client, and none gets an ID that another one has") {
  Client client(server_url(), of());
  std::mutex mutex;
  std::set<cidalloc::Id> used;
  std::atomic<int> twice{0};
  std::vector<std::thread> threads;
  threads.reserve(64);
  for (int i = 0; i < 64; ++i) {
    threads.emplace_back([&, i] {
      for (int round = 0; round < 50; ++round) {
        const auto ids = client.acquire_many(static_cast<std::size_t>(1 + (i + round) % 3));
        {
          const std::lock_guard lock(mutex);
          for (const auto id : ids) twice += used.insert(id).second ? 0 : 1;
        }
        std::this_thread::yield();
        {
          const std::lock_guard lock(mutex);
          for (const auto id : ids) used.erase(id);
        }
        client.release_many(ids, round % 4 == 0 ? cidalloc::Duration(0) : cidalloc::ENDED);
      }
    });
  }
  for (auto& each : threads) each.join();
  CHECK(twice == 0);
  CHECK(client.held().empty());
}

TEST_CASE("Objects can be moved, and a sequence may outlive its client") {
  static_assert(std::is_nothrow_destructible_v<Client> && !std::is_copy_constructible_v<Client>);
  static_assert(std::is_nothrow_move_constructible_v<cidalloc::Sequence>);
  static_assert(std::is_nothrow_move_assignable_v<cidalloc::Request>);
  auto client = std::make_unique<Client>(server_url(), of());
  auto moved = std::move(*client);
  CHECK(code_of([&] { client->acquire(); }) == Code::INVALID_ARGUMENT);
  *client = std::move(moved);
  auto sequence = client->sequence("simple_sequence");
  auto request = sequence.next();
  client.reset();
  CHECK(code_of([&] { sequence.next(); }) == Code::INVALID_ARGUMENT);
  request.answered();
}
