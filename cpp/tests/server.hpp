// The real Triton server that tests/cpp/test_cpp.py has started, and requests to it.
#pragma once

#include <curl/curl.h>

#include <chrono>
#include <cidalloc.hpp>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

using namespace std::chrono_literals;  // NOLINT(google-build-using-namespace)

/// A value that the launcher gives.
inline std::string given(const char* name) {
  const char* const value = std::getenv(name);  // NOLINT(concurrency-mt-unsafe)
  if (value == nullptr) throw std::runtime_error(std::string("run it by make cpp: no ") + name);
  return value;
}

inline std::string server_url() {
  return given("CIDALLOC_URL");
}
inline int server_port() {
  return std::stoi(server_url().substr(server_url().rfind(':') + 1));
}

/// Options for a manager of the launcher; "quick" has no cooldown and allows short TTLs.
inline cidalloc::Options of(const std::string& manager = "quick", cidalloc::Duration ttl = 10s) {
  cidalloc::Options options;
  options.model = manager;
  options.ttl = ttl;
  options.timeout = 3s;
  return options;
}

/// Returns the status and the body of an answer to a POST.
inline std::pair<long, nlohmann::json> post(const std::string& path, const std::string& body) {
  std::string text;
  CURL* const curl = ::curl_easy_init();
  const auto url = server_url() + path;
  const auto receive = [](char* data, std::size_t, std::size_t size, void* to) {
    static_cast<std::string*>(to)->append(data, size);
    return size;
  };
  ::curl_easy_setopt(curl, CURLOPT_URL, url.c_str());
  ::curl_easy_setopt(curl, CURLOPT_POSTFIELDS, body.c_str());
  ::curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
  ::curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION,
                     static_cast<std::size_t (*)(char*, std::size_t, std::size_t, void*)>(receive));
  ::curl_easy_setopt(curl, CURLOPT_WRITEDATA, &text);
  long status = 0;
  if (::curl_easy_perform(curl) == CURLE_OK) {
    ::curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &status);
  }
  ::curl_easy_cleanup(curl);
  return {status, nlohmann::json::parse(text, nullptr, false)};
}

/// Sends a number to a model that adds, and returns the sum, or -1 after an error.
inline int add(cidalloc::Request& request, int value,
               const std::string& model = "simple_sequence") {
  nlohmann::json body;
  body["inputs"] = {
      {{"name", "INPUT"}, {"datatype", "INT32"}, {"shape", {1, 1}}, {"data", {value}}}};
  body["parameters"] = {{"sequence_id", request.id()},
                        {"sequence_start", request.start()},
                        {"sequence_end", request.end()},
                        {"timeout", request.timeout().count()}};
  const auto [status, answer] = post("/v2/models/" + model + "/infer", body.dump());
  if (status != 200) return -1;
  request.answered();
  return answer["outputs"][0]["data"][0].get<int>();
}

/// Loads a model again, as an operator does. Load alone does nothing if no file has changed.
inline void reload(const std::string& model) {
  for (const auto* what : {"/unload", "/load"}) {
    const auto [status, answer] = post("/v2/repository/models/" + model + what, "{}");
    if (status != 200) throw std::runtime_error(answer.dump());
  }
}

/// Waits until a condition holds, for ten seconds at most.
template <class Condition>
bool eventually(Condition condition) {
  const auto until = std::chrono::steady_clock::now() + 10s;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > until) return false;
    std::this_thread::sleep_for(20ms);
  }
  return true;
}

/// Returns the code of the error of a call, or 0 without one.
template <class Call>
cidalloc::Code code_of(Call call, std::string* text = nullptr) {
  try {
    call();
    return cidalloc::Code{};
  } catch (const cidalloc::Error& error) {
    if (text != nullptr) *text = error.what();
    return error.code();
  }
}
