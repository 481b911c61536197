// An HTTP proxy on loopback that loses, refuses or replaces what a test wants.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

/// A socket that is closed at its end.
class Socket {
 public:
  explicit Socket(int number = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0))
      : number_(number) {}
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  ~Socket() { ::close(number_); }

  [[nodiscard]] int number() const { return number_; }

  static sockaddr_in loopback(int port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = ::htonl(INADDR_LOOPBACK);
    address.sin_port = ::htons(static_cast<std::uint16_t>(port));
    return address;
  }

  [[nodiscard]] bool connect(int port) const {
    const auto address = loopback(port);
    return ::connect(number_, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
  }

  [[nodiscard]] bool send(const std::string& text) const {
    std::size_t sent = 0;
    while (sent < text.size()) {
      const auto more = ::send(number_, text.data() + sent, text.size() - sent, MSG_NOSIGNAL);
      if (more <= 0) return false;
      sent += static_cast<std::size_t>(more);
    }
    return true;
  }

  /// Returns one message of HTTP with a Content-Length; nothing at the end of the connection.
  [[nodiscard]] std::string message() const {
    std::string text;
    std::size_t wanted = std::string::npos;
    while (text.size() < wanted) {
      std::string piece(1U << 16U, '\0');
      const auto size = ::recv(number_, piece.data(), piece.size(), 0);
      if (size <= 0) return {};
      text.append(piece, 0, static_cast<std::size_t>(size));
      const auto head = text.find("\r\n\r\n");
      if (wanted == std::string::npos && head != std::string::npos) {
        auto lower = text.substr(0, head);
        std::transform(lower.begin(), lower.end(), lower.begin(), ::tolower);
        const auto at = lower.find("content-length: ");
        wanted = head + 4 + (at == std::string::npos ? 0 : std::stoul(lower.substr(at + 16)));
      }
    }
    return text;
  }

 private:
  int number_;
};

/// Carries requests to a server, and does with each one what `fate` says.
class Proxy {
 public:
  enum class Fate { PASS, REFUSE, LOSE_ANSWER };

  explicit Proxy(int target) : target_(target) {
    auto address = Socket::loopback(0);
    socklen_t size = sizeof address;
    auto* const raw = reinterpret_cast<sockaddr*>(&address);
    if (::bind(listener_.number(), raw, size) != 0 || ::listen(listener_.number(), 64) != 0 ||
        ::getsockname(listener_.number(), raw, &size) != 0) {
      throw std::runtime_error("no port for the proxy");
    }
    port_ = ::ntohs(address.sin_port);
    acceptor_ = std::thread([this] { accept(); });
  }
  Proxy(const Proxy&) = delete;
  Proxy& operator=(const Proxy&) = delete;
  ~Proxy() {
    ::shutdown(listener_.number(), SHUT_RDWR);
    acceptor_.join();
    {
      const std::lock_guard lock(mutex_);
      for (const int each : open_) ::shutdown(each, SHUT_RDWR);
    }
    for (auto& each : threads_) each.join();
  }

  [[nodiscard]] std::string url() const { return "http://127.0.0.1:" + std::to_string(port_); }

  /// What happens to each request from now on.
  void decide(std::function<Fate(const std::string& request)> fate) {
    const std::lock_guard lock(mutex_);
    fate_ = std::move(fate);
  }
  void cut() {
    decide([](const std::string&) { return Fate::REFUSE; });
  }
  void mend() {
    decide([](const std::string&) { return Fate::PASS; });
  }

  /// Answers every request with this from now on, in which {} stands for the request's body.
  void answer(const std::string& status, const std::string& body) {
    const std::lock_guard lock(mutex_);
    canned_ = {status, body};
  }

  /// All requests that came.
  std::vector<std::string> seen() {
    const std::lock_guard lock(mutex_);
    return seen_;
  }

  /// The number of an operation, or -1 if the request is not for a manager.
  static int operation(const std::string& request) {
    const auto body = nlohmann::json::parse(body_of(request), nullptr, false);
    return body.is_object() ? body["inputs"][0]["data"][0].get<int>() : -1;
  }
  static std::string body_of(const std::string& request) {
    return request.substr(request.find("\r\n\r\n") + 4);
  }

 private:
  void accept() {
    for (;;) {
      const int number = ::accept4(listener_.number(), nullptr, nullptr, SOCK_CLOEXEC);
      if (number < 0) return;
      const std::lock_guard lock(mutex_);
      open_.push_back(number);
      threads_.emplace_back([this, number] { serve(number); });
    }
  }

  void serve(int number) {
    const Socket client(number);
    const Socket server;
    bool connected = false;
    for (auto request = client.message(); !request.empty(); request = client.message()) {
      auto [fate, answer] = what(request);
      if (fate == Fate::REFUSE) break;
      if (answer.empty()) {
        connected = connected || server.connect(target_);
        if (!connected || !server.send(request)) break;
        answer = server.message();
      }
      if (fate == Fate::LOSE_ANSWER || answer.empty() || !client.send(answer)) break;
    }
    const std::lock_guard lock(mutex_);
    open_.erase(std::find(open_.begin(), open_.end(), number));
  }

  /// What happens to a request, and its answer if the server is not asked.
  std::pair<Fate, std::string> what(const std::string& request) {
    std::unique_lock lock(mutex_);
    seen_.push_back(request);
    auto [status, body] = canned_;
    const auto fate = fate_;
    lock.unlock();
    if (status.empty()) return {fate(request), ""};
    if (const auto at = body.find("{}"); at != std::string::npos) {
      body.replace(at, 2, body_of(request));
    }
    const auto length = std::to_string(body.size());
    return {Fate::PASS, "HTTP/1.1 " + status + "\r\nContent-Length: " + length + "\r\n\r\n" + body};
  }

  Socket listener_;
  int target_;
  int port_ = 0;
  std::mutex mutex_;
  std::function<Fate(const std::string&)> fate_ = [](const std::string&) { return Fate::PASS; };
  std::pair<std::string, std::string> canned_;
  std::vector<std::string> seen_;
  std::vector<int> open_;
  std::vector<std::thread> threads_;
  std::thread acceptor_;
};
