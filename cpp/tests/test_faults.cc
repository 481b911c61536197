// The client in C++ with the real manager, while the network, the server and the process fail.
#include <doctest/doctest.h>
#include <sys/wait.h>

#include <atomic>
#include <memory>
#include <set>

#include "proxy.hpp"
#include "server.hpp"

using cidalloc::Client;
using cidalloc::Code;
using cidalloc::Ids;
using Clock = std::chrono::steady_clock;

namespace {

/// How many IDs a session holds at the manager "quick".
int held_by(const std::string& label) {
  const Client client(server_url(), of());
  const auto status = client.status();
  for (const auto& each : status["sessions"]) {
    if (each["label"] == label) return each["held"].get<int>();
  }
  return -1;
}

/// Loses the answers to the next requests of these operations.
void lose(Proxy& proxy, const std::set<int>& operations, int count) {
  const auto left = std::make_shared<std::atomic<int>>(count);
  proxy.decide([operations, left](const std::string& request) {
    const bool loses = operations.count(Proxy::operation(request)) != 0 && (*left)-- > 0;
    return loses ? Proxy::Fate::LOSE_ANSWER : Proxy::Fate::PASS;
  });
}

/// Runs a command.
bool runs(const std::string& command) {
  return std::system(command.c_str()) == 0;  // NOLINT(cert-env33-c,concurrency-mt-unsafe)
}

}  // namespace

TEST_CASE("A server that is away at the start is told at once, and may come later") {
  Proxy proxy(server_port());
  proxy.cut();
  Client client(proxy.url(), of());
  const auto began = Clock::now();
  CHECK(code_of([&] { client.acquire(); }) == Code::UNAVAILABLE);
  CHECK(Clock::now() - began < 1s);
  CHECK(code_of([&] { Client("127.0.0.1:9").acquire(); }) == Code::UNAVAILABLE);
  proxy.mend();
  CHECK(client.acquire() != 0);
}

TEST_CASE("A call waits while the server is away for a moment") {
  Proxy proxy(server_port());
  Client client(proxy.url(), of());
  CHECK(client.acquire() != 0);
  proxy.cut();
  std::thread mender([&] {
    std::this_thread::sleep_for(500ms);
    proxy.mend();
  });
  CHECK(client.acquire_many(100).size() == 100);
  mender.join();
}

TEST_CASE("A lost answer costs no ID, and no ID is issued twice") {
  // NEW, DELETE, OPEN, RENEW and HELD; libcurl itself sends a request again on a new connection.
  for (const int operation : {0, 1, 5, 6, 8}) {
    for (const int count : {1, 2, 3}) {
      CAPTURE(operation);
      CAPTURE(count);
      Proxy proxy(server_port());
      auto options = of("quick", 1s);
      options.ahead = 0;
      options.label = "lost " + std::to_string(operation) + " " + std::to_string(count);
      Client client(proxy.url(), options);
      if (operation != 5) CHECK(client.acquire() != 0);
      const auto before = client.held();
      lose(proxy, operation == 8 ? std::set{0, 8} : std::set{operation}, count);
      // OPEN is the first contact here, which is tried once.
      for (int i = 0; operation == 5 && i < count; ++i) {
        CHECK(code_of([&] { client.acquire(); }) == Code::UNAVAILABLE);
      }
      auto ids = client.acquire_many(3);
      CHECK(std::set<cidalloc::Id>(ids.begin(), ids.end()).size() == 3);
      CHECK(client.held().size() == before.size() + 3);
      CHECK(eventually(
          [&] { return held_by(options.label) == static_cast<int>(before.size()) + 3; }));
      client.release_many(ids, cidalloc::ENDED);
      CHECK(eventually([&] { return held_by(options.label) == static_cast<int>(before.size()); }));
      std::this_thread::sleep_for(400ms);  // a heartbeat
      CHECK(client.held() == before);
    }
  }
}

TEST_CASE("No ID is used after the lease, and all goes on if the session is known later") {
  Proxy proxy(server_port());
  auto options = of("patient", 1s);
  options.timeout = 300ms;
  Client client(proxy.url(), options);
  auto sequence = client.sequence("simple_sequence");
  auto request = sequence.next();
  request.answered();
  proxy.cut();
  const auto cut = Clock::now();
  auto last = cut;
  for (; Clock::now() - cut < 1500ms; std::this_thread::sleep_for(1ms)) {
    const auto before = Clock::now();
    const auto code = code_of([&] {
      client.release(client.acquire(), cidalloc::ENDED);
      (void)sequence.next();
    });
    if (code == Code{}) last = before;
  }
  CHECK(last - cut > 300ms);
  CHECK(last - cut <= 1s);
  CHECK(code_of([&] { (void)sequence.next(); }) == Code::SESSION_EXPIRED);
  CHECK(code_of([&] { client.acquire(); }) == Code::SESSION_EXPIRED);
  CHECK(client.held() == Ids{sequence.id()});
  proxy.mend();
  CHECK(eventually([&] { return code_of([&] { (void)sequence.next(); }) == Code{}; }));
}

TEST_CASE("When the session has expired, its IDs are lost, and a new session is opened") {
  Proxy proxy(server_port());
  std::vector<std::string> lines;  // written under the client's lock
  auto options = of("quick", 500ms);
  options.timeout = 1s;
  options.label = "expires";
  options.log = [&](const std::string& line) { lines.push_back(line); };
  {
    Client client(proxy.url(), options);
    auto sequence = client.sequence("simple_sequence");
    const auto bare = client.acquire();
    proxy.cut();
    CHECK(eventually([] { return held_by("expires") == -1; }));
    proxy.mend();
    CHECK(eventually([&] { return client.held().empty(); }));
    std::string text;
    CHECK(code_of([&] { (void)sequence.next(); }, &text) == Code::SEQUENCE_LOST);
    CHECK(code_of([&] { client.release(bare); }) == Code::SESSION_EXPIRED);
    CHECK(code_of([&] { client.release(bare); }) == Code::NOT_HELD);
    const auto next = client.acquire();
    CHECK(client.held() == Ids{next});
    sequence.close();
    CHECK(client.held() == Ids{next});
  }
  CHECK(std::any_of(lines.begin(), lines.end(),
                    [](const auto& each) { return each.find("lost") != std::string::npos; }));
}

TEST_CASE("The token is in no log and no error") {
  std::vector<std::string> lines;
  std::vector<std::string> errors;
  std::string token;
  {
    Proxy proxy(server_port());
    auto options = of("quick", 500ms);
    options.timeout = 500ms;
    options.log = [&](const std::string& line) { lines.push_back(line); };
    Client client(proxy.url(), options);
    CHECK(client.acquire() != 0);
    const auto request = nlohmann::json::parse(Proxy::body_of(proxy.seen().back()));
    token = request["parameters"]["session"];
    REQUIRE(token.size() == 32);
    for (const auto* status : {"400 Bad Request", "200 OK", "502 Bad Gateway"}) {
      for (const auto* body : {"{}", R"({"error": "you sent {}"})", "<p>{}</p>", "[{}]"}) {
        proxy.answer(status, body);
        std::string text;
        CHECK(code_of([&] { client.acquire_many(100); }, &text) != Code{});
        errors.push_back(text);
      }
    }
    std::this_thread::sleep_for(600ms);  // heartbeats fail
  }
  for (const auto& line : lines) CHECK(line.find(token) == std::string::npos);
  for (const auto& each : errors) CHECK(each.find(token) == std::string::npos);
  CHECK(!lines.empty());
}

TEST_CASE("Answers of something else than a manager are errors") {
  Proxy proxy(server_port());
  const auto code = [&](const std::string& status, const std::string& body) {
    proxy.answer(status, body);
    return code_of([&] { Client(proxy.url(), of()).acquire(); });
  };
  CHECK(code("200 OK", "<html>Hello</html>") == Code::PROTOCOL);
  CHECK(code("200 OK", R"({"outputs": [{"name": "OUTPUT", "data": [-1]}]})") == Code::PROTOCOL);
  CHECK(code("200 OK", R"({"outputs": [{"name": "OUTPUT", "data": [1.5]}]})") == Code::PROTOCOL);
  CHECK(code("200 OK", R"({"outputs": [{"name": "OUTPUT"}]})") == Code::PROTOCOL);
  CHECK(code("200 OK", R"({"outputs": [{"name": "OUTPUT", "data": [2, 1]}]})") == Code::PROTOCOL);
  CHECK(code("200 OK", std::string(100'000, '[')) == Code::PROTOCOL);
  CHECK(code("301 Moved Permanently", "") == Code::PROTOCOL);
  CHECK(code("404 Not Found", "<html>Not here</html>") == Code::PROTOCOL);
  CHECK(code("502 Bad Gateway", "<html>Bad Gateway</html>") == Code::UNAVAILABLE);
  CHECK(code("503 Service Unavailable", "") == Code::UNAVAILABLE);
  CHECK(code("413 Too Large", "") == Code::LIMIT_EXCEEDED);
  CHECK(code("500 Error", R"({"error": "no"})") == Code::INTERNAL);
  CHECK(code("503 Later", R"({"error": "in x: [CIDALLOC 999 NEW_NAME] hm"})") == Code::UNAVAILABLE);
  CHECK(code("400 No", R"({"error": "[CIDALLOC 20 DRAINING] soon"})") == Code::DRAINING);
  CHECK(code_of([] { Client(server_url(), of("simple_sequence")).acquire(); }) ==
        Code::INVALID_ARGUMENT);
}

TEST_CASE("TLS is checked") {
  const auto url = given("CIDALLOC_TLS_URL");
  CHECK(code_of([&] { Client(url, of()).acquire(); }) == Code::UNAVAILABLE);
  auto options = of();
  options.configure = [](CURL* curl) {
    ::curl_easy_setopt(curl, CURLOPT_CAINFO, given("CIDALLOC_CA").c_str());
  };
  CHECK(Client(url, options).acquire() != 0);
}

TEST_CASE("Destructors throw nothing and end soon, also if the server is silent") {
  Proxy proxy(server_port());
  auto client = std::make_unique<Client>(proxy.url(), of("quick", 600ms));
  auto sequence = client->sequence("simple_sequence");
  auto request = sequence.next();
  proxy.decide([](const std::string&) {
    std::this_thread::sleep_for(4s);
    return Proxy::Fate::REFUSE;
  });
  std::this_thread::sleep_for(300ms);  // a heartbeat waits
  const auto began = Clock::now();
  client.reset();
  CHECK(Clock::now() - began < 3500ms);
  CHECK(code_of([&] { (void)sequence.next(); }) == Code::INVALID_ARGUMENT);
}

TEST_CASE("A forked child gets an error, and does the parent no harm") {
  Client client(server_url(), of());
  auto sequence = std::make_unique<cidalloc::Sequence>(client.sequence("simple_sequence"));
  auto request = std::make_unique<cidalloc::Request>(sequence->next());
  const auto before = client.held();
  const auto child = ::fork();
  if (child == 0) {
    const bool refused = code_of([&] { client.acquire(); }) == Code::FORKED &&
                         code_of([&] { (void)sequence->next(); }) == Code::FORKED &&
                         code_of([&] { request->answered(); }) == Code::FORKED &&
                         code_of([&] { client.close(); }) == Code::FORKED;
    request.reset();
    sequence.reset();
    { auto gone = std::move(client); }
    ::_exit(refused ? 0 : 1);
  }
  int status = -1;
  CHECK(::waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  request->answered();
  CHECK(client.held() == before);
  client.release(client.acquire());
}

TEST_CASE("A manager that is reloaded keeps the session if it has a file, and else forgets it") {
  for (const auto* manager : {"kept", "volatile"}) {
    CAPTURE(manager);
    Client client(server_url(), of(manager, 2s));
    auto sequence = client.sequence("simple_sequence");
    const auto before = client.acquire();
    reload(manager);
    const auto ids = client.acquire_many(100);
    const bool kept = std::string(manager) == "kept";
    CHECK(client.held().size() == (kept ? 102 : 100));
    CHECK((code_of([&] { (void)sequence.next(); }) == Code{}) == kept);
    if (kept) CHECK(code_of([&] { client.release(before); }) == Code{});  // else issued again
  }
}

TEST_CASE("A server that is drained issues no ID, and none of the cache") {
  Client client(server_url(), of("kept", 1s));
  auto sequence = client.sequence("simple_sequence");
  const auto drain = given("CIDALLOC_DRAIN");
  REQUIRE(runs(drain + " >/dev/null"));
  CHECK(eventually([&] {
    return code_of([&] { client.release(client.acquire(), cidalloc::ENDED); }) == Code::DRAINING;
  }));
  CHECK(code_of([&] { (void)sequence.next(); }) == Code{});
  REQUIRE(runs(drain + " --undo >/dev/null"));
  CHECK(client.acquire() != 0);
}
