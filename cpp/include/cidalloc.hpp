// A client of cidalloc's manager in one header: correlation IDs for sequences on Triton, over HTTP.
//
// It needs C++17, Linux, libcurl and nlohmann-json. docs/cpp.md shows how to use it. In this order:
// numbers, errors and options; the ID cache; HTTP; the session; and at the end what an application
// uses: `Request`, `Sequence` and `Client`.
#pragma once

#include <curl/curl.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cctype>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <unordered_set>
#include <utility>
#include <vector>

namespace cidalloc {

// cpp/generate.py writes this block. Do not change it here.
// clang-format off

/// Why a call failed. The numbers never change.
enum class Code {
  EXHAUSTED = 1,  ///< No ID can be issued: all are held, cooling, or pinned by their block.
  NOT_HELD = 2,  ///< The ID is in the pool, but is not held.
  NOT_OWNER = 3,  ///< Another client holds the ID.
  OUT_OF_RANGE = 4,  ///< The ID lies outside the pool: 0, negative, or beyond an end.
  DUPLICATE = 5,  ///< The same ID is given twice in one call.
  INVALID_ARGUMENT = 6,  ///< A value, type or shape that the operation does not accept.
  UNKNOWN_OPERATION = 7,  ///< This manager has no operation with this `CODE`.
  SESSION_UNKNOWN = 8,  ///< No such session: it was never opened, was closed, or has expired.
  LIMIT_EXCEEDED = 9,  ///< More than a setting of the manager allows.
  REPEATED = 10,  ///< A change with this `seq` or a later one came before.
  REGISTRY_LOCKED = 11,  ///< Another process writes the registry's file.
  REGISTRY_CORRUPT = 12,  ///< The registry's file is damaged, truncated, or not a registry.
  REGISTRY_MISMATCH = 13,  ///< The registry has other settings, or is not the expected one.
  UNAVAILABLE = 14,  ///< The manager cannot be reached or cannot answer now; trying again may help.
  PROTOCOL = 15,  ///< The answer does not follow the protocol.
  INTERNAL = 16,  ///< A fault in cidalloc.
  SESSION_EXPIRED = 17,  ///< The client's lease ended before a heartbeat was answered. Client only.
  /// The server has forgotten the sequence, or may have forgotten it. Client only.
  SEQUENCE_LOST = 18,
  FORKED = 19,  ///< The object belongs to the parent process of this fork. Never sent.
  DRAINING = 20,  ///< The server is being drained: it issues no more IDs, and opens no session.
};

namespace protocol {

inline constexpr std::array<const char*, 21> CODE_NAMES = {
    nullptr, "EXHAUSTED", "NOT_HELD", "NOT_OWNER", "OUT_OF_RANGE", "DUPLICATE",
    "INVALID_ARGUMENT", "UNKNOWN_OPERATION", "SESSION_UNKNOWN", "LIMIT_EXCEEDED", "REPEATED",
    "REGISTRY_LOCKED", "REGISTRY_CORRUPT", "REGISTRY_MISMATCH", "UNAVAILABLE", "PROTOCOL",
    "INTERNAL", "SESSION_EXPIRED", "SEQUENCE_LOST", "FORKED", "DRAINING"};
enum class Operation {
    NEW = 0, DELETE = 1, ACTIVE = 2, INACTIVE = 3, PEAK = 4, OPEN = 5, RENEW = 6, CLOSE = 7,
    HELD = 8, STATUS = 9, DEAD = 10};
inline constexpr const char* MODEL = "cidmgr";
inline constexpr const char* ROUTE_HEADER = "cid-slice";
inline constexpr const char* DRAINING = "draining";
inline constexpr int STAMP_DIGITS = 32;
inline constexpr int PROTOCOL = 1;
inline constexpr int MAX_COOLDOWN_MS = 604800000;
inline constexpr int MAX_MODELS = 16;

}  // namespace protocol

// clang-format on

using Id = std::uint64_t;
using Ids = std::vector<Id>;
using Duration = std::chrono::milliseconds;

/// The name of a code; null if this version does not know the number.
constexpr const char* name(Code code) noexcept {
  const auto at = static_cast<std::size_t>(code);
  return at < protocol::CODE_NAMES.size() ? protocol::CODE_NAMES[at] : nullptr;
}

/// The only exception of this library. The text begins with the name of the code.
class Error : public std::runtime_error {
 public:
  Error(Code code, const std::string& text, bool answered = false)
      : std::runtime_error(std::string(name(code)) + ": " + text),
        code_(code),
        answered_(answered) {}

  [[nodiscard]] Code code() const noexcept { return code_; }
  /// Whether the manager sent this error: it has done nothing. Otherwise it may have.
  [[nodiscard]] bool answered() const noexcept { return answered_; }

 private:
  Code code_;
  bool answered_;
};

/// In place of a cooldown: END was sent and answered with success, on every model of the ID.
inline constexpr Duration ENDED{-1};
/// In place of a cooldown: the manager's own for an ID without END, two minutes by default.
inline constexpr Duration UNENDED{-2};

struct Options {
  /// The name of the manager's model.
  std::string model = protocol::MODEL;
  /// The name of the session in the manager's status. Default: host and process ID.
  std::string label;
  /// The session expires at the manager after so long without a heartbeat.
  Duration ttl = std::chrono::minutes(2);
  /// For how long a call waits for the manager.
  Duration timeout = std::chrono::seconds(10);
  /// Maximum number of unused IDs in the ID cache; 0 turns the cache off.
  std::size_t ahead = 1024;
  /// Sent with every request, as "Name: value".
  std::vector<std::string> headers;
  /// Sets further options of each connection, for example CURLOPT_CAINFO. Called in any thread.
  std::function<void(CURL*)> configure;
  /// Takes a line about each failed heartbeat and each lost session. Called in any thread under the
  /// client's lock, so it must not use the client, nor throw.
  std::function<void(const std::string&)> log;
};

struct SequenceOptions {
  /// For how long Triton may let a request wait: give it to Triton with each request.
  Duration timeout = std::chrono::minutes(1);
  /// The time after which the model has certainly forgotten an idle sequence. Then the model's
  /// configuration is not read. Default: the idle time in the configuration.
  std::optional<Duration> cooldown;
};

namespace detail {

using nlohmann::json;
using protocol::Operation;
using std::chrono::seconds;
using Lock = std::unique_lock<std::mutex>;

/// Runs on in suspend and never jumps. A lease ends by this clock.
struct BootClock {
  using duration = std::chrono::nanoseconds;
  using rep = duration::rep;
  using period = duration::period;
  using time_point = std::chrono::time_point<BootClock>;
  static constexpr bool is_steady = true;

  static time_point now() noexcept {
    timespec now{};
    ::clock_gettime(CLOCK_BOOTTIME, &now);
    return time_point(seconds(now.tv_sec) + duration(now.tv_nsec));
  }
};

using Time = BootClock::time_point;
inline Time now() noexcept {
  return BootClock::now();
}

/// Lets go of a lock for as long as it lives.
class Unlocked {
 public:
  explicit Unlocked(Lock& lock) : lock_(lock) { lock_.unlock(); }
  ~Unlocked() { lock_.lock(); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  Lock& lock_;
};

/// How many forks are between this process and the first one.
inline unsigned forks() noexcept {
  static std::atomic<unsigned> count{0};
  static const int registered = ::pthread_atfork(nullptr, nullptr, [] { ++count; });
  static_cast<void>(registered);
  return count.load(std::memory_order_relaxed);
}

/// Calls `drop` of its object at the end, and lets no exception out. A forked child leaks the
/// object instead, since the threads that may hold its lock are in the parent.
template <class T>
class Owner {
 public:
  explicit Owner(std::shared_ptr<T> object) noexcept : object_(std::move(object)) {}
  Owner(Owner&&) noexcept = default;
  Owner& operator=(Owner&& other) noexcept {
    std::swap(object_, other.object_);
    std::swap(home_, other.home_);
    return *this;
  }
  Owner(const Owner&) = delete;
  Owner& operator=(const Owner&) = delete;
  ~Owner() {
    try {
      if (object_ && home_ == forks()) {
        object_->drop();
      } else if (object_) {
        static_cast<void>(new std::shared_ptr<T>(std::move(object_)));
      }
    } catch (...) {  // what it would have released is released when the session ends
      return;
    }
  }

  [[nodiscard]] const std::shared_ptr<T>& get() const {
    if (home_ != forks()) throw Error(Code::FORKED, "this belongs to the parent process");
    if (!object_) throw Error(Code::INVALID_ARGUMENT, "this object was moved from");
    return object_;
  }
  T* operator->() const { return get().get(); }

 private:
  std::shared_ptr<T> object_;
  unsigned home_ = forks();
};

// ---- The ID cache

/// The IDs of one session. Each is in one place: `used` by the application; `fresh`; `cooling`,
/// ended and soon usable again; `leaving`, to be released; or `releasing`, in a request without an
/// answer. Under the lock of the session.
class IdCache {
 public:
  explicit IdCache(std::size_t ahead = 0) : ahead_(ahead), target_(ahead == 0 ? 0 : 1) {}

  Duration cooldown{0};   // the minimum time between two uses of an ID
  bool draining = false;  // no ID is taken, and unused ones are released
  bool needs_refill = false;
  Time trim_at{};
  Ids releasing;
  Duration releasing_for{};  // their cooldown

  /// Returns an ID that is used from now on; 0 if none is ready.
  Id take(Time now) {
    taken_at_ = now;
    if (draining) return 0;
    if (!cooling_.empty() && cooling_.front().first <= now) {
      const Id id = *used_.insert(std::move(cooling_.front().second)).position;
      cooling_.pop_front();
      return id;
    }
    if (fresh_.empty()) return 0;
    const Id id = *used_.insert(fresh_.front()).first;
    fresh_.pop_front();
    needs_refill = needs_refill || 2 * fresh_.size() < target_;
    return id;
  }

  /// Takes back a used ID, with its cooldown or `ENDED`.
  void give(Id id, Duration after, Time now) {
    const auto others = cooling_.size() + std::max(fresh_.size(), ahead_ > 1 ? target_ : 0);
    if (after == ENDED && others < ahead_ && !draining) {
      cooling_.emplace_back(now + cooldown, used_.extract(id));
    } else {
      leaving_[after].push_back(id);
      used_.erase(id);
    }
  }

  [[nodiscard]] const std::unordered_set<Id>& used() const { return used_; }
  [[nodiscard]] bool uses(Id id) const { return used_.count(id) != 0; }
  [[nodiscard]] bool outgoing() const { return !(leaving_.empty() && releasing.empty()); }

  /// How many IDs can be taken now; it may stop counting at `enough`.
  [[nodiscard]] std::size_t ready(Time now, std::size_t enough) const {
    if (draining) return 0;
    auto count = fresh_.size();
    for (auto it = cooling_.begin(); count < enough && it != cooling_.end(); ++it, ++count) {
      if (it->first > now) break;
    }
    return count;
  }

  /// When the heartbeat has to release or to fetch IDs.
  [[nodiscard]] Time due(Time now) const {
    const bool unwanted = draining && !(fresh_.empty() && cooling_.empty());
    if (unwanted || (needs_refill && now >= refill_after_)) return {};
    // With a pause between two requests, so that many IDs leave together.
    return leaving_.empty() ? Time::max() : released_at_ + std::chrono::microseconds(50 * ahead_);
  }

  /// How many IDs to fetch ahead, by the recent demand, when `taken` cached ones are taken.
  std::size_t plan(Time now, std::size_t taken) {
    if (now < refill_after_) return 0;
    if (now - refilled_at_ < seconds(1)) {  // empty again so soon: it was too small
      target_ = std::min(2 * target_, std::max<std::size_t>(ahead_ / 2, 1));
    }
    refilled_at_ = now;
    const auto left = cooling_.size() + fresh_.size() - taken;
    return left < ahead_ ? std::min(target_, ahead_ - left) : 0;
  }

  /// Fetch none ahead for a while: the manager had no more.
  void refill_failed(Time now) { refill_after_ = now + seconds(10); }

  /// Adds new IDs; the first `count` of them are used from now on.
  void refill(const Ids& ids, std::size_t count, Time now) {
    if (count > 0) taken_at_ = now;
    const auto rest = ids.begin() + static_cast<std::ptrdiff_t>(count);
    used_.insert(ids.begin(), rest);
    fresh_.insert(fresh_.end(), rest, ids.end());
    needs_refill = false;
  }

  void drain(bool on) {
    draining = on;
    needs_refill = needs_refill && !on;
  }

  /// Releases unused IDs without demand: for 30 s or more, for 5 s if others wait, all in a drain.
  void trim(Time now, bool others_wait = false) {
    constexpr auto STALE = seconds(30);
    for (; target_ > 1 && now - refilled_at_ >= 2 * STALE; refilled_at_ += STALE) target_ /= 2;
    const bool idle = draining || now - taken_at_ >= (others_wait ? seconds(5) : 2 * STALE);
    const bool stale = now - refilled_at_ >= STALE;
    const auto spare = [&] { return fresh_.size() + cooling_.size() > target_; };
    const auto drop_cooling = [&](Time due) {
      return !cooling_.empty() && (draining || (idle && cooling_.front().first <= now) ||
                                   (spare() && cooling_.front().first <= due));
    };
    for (; drop_cooling(now - STALE); cooling_.pop_front()) {
      leaving_[ENDED].push_back(cooling_.front().second.value());
    }
    while (!fresh_.empty() && (idle || (stale && fresh_.size() > target_))) {
      leaving_[ENDED].push_back(fresh_.front());
      fresh_.pop_front();
    }
    trim_at = now + STALE;
  }

  /// Moves at most so many leaving IDs, all with one cooldown, to `releasing`.
  void send(std::size_t most, Time now) {
    requeue();
    released_at_ = now;
    if (leaving_.empty()) return;
    auto& [after, ids] = *leaving_.begin();
    releasing_for = after;
    const auto rest = ids.end() - static_cast<std::ptrdiff_t>(std::min(most, ids.size()));
    releasing.assign(rest, ids.end());
    ids.erase(rest, ids.end());
    if (ids.empty()) leaving_.erase(leaving_.begin());
  }

  /// The manager refuses to release the ID in `releasing`: it is used until the client is closed.
  void keep() {
    used_.insert(releasing.begin(), releasing.end());
    releasing.clear();
  }

  /// Adopts the manager's list of what the session holds. IDs that are not known here are those of
  /// an answer that was lost, and fresh. Returns the used IDs that the session does not hold, and
  /// whether an answer was lost.
  std::pair<Ids, bool> reconcile(std::unordered_set<Id> held) {
    requeue();
    const auto gone = [&](Id id) { return held.erase(id) == 0; };
    drop_if(fresh_, gone);
    drop_if(cooling_, [&](const auto& each) { return gone(each.second.value()); });
    for (auto it = leaving_.begin(); it != leaving_.end();) {
      drop_if(it->second, gone);
      it = it->second.empty() ? leaving_.erase(it) : std::next(it);
    }
    Ids lost;
    std::copy_if(used_.begin(), used_.end(), std::back_inserter(lost), gone);
    for (const Id id : lost) used_.erase(id);
    fresh_.insert(fresh_.end(), held.begin(), held.end());
    return {lost, !held.empty()};
  }

 private:
  template <class List, class Test>
  static void drop_if(List& list, Test test) {
    list.erase(std::remove_if(list.begin(), list.end(), test), list.end());
  }

  /// The release request did nothing, or nobody knows: its IDs have to be released again.
  void requeue() {
    if (releasing.empty()) return;
    auto& ids = leaving_[releasing_for];
    ids.insert(ids.end(), releasing.begin(), releasing.end());
    releasing.clear();
  }

  std::size_t ahead_, target_;  // the target is the number of IDs to fetch ahead
  std::unordered_set<Id> used_;
  std::deque<Id> fresh_;
  std::deque<std::pair<Time, std::unordered_set<Id>::node_type>> cooling_;  // as `used_` has it
  std::map<Duration, Ids> leaving_;                                         // by their cooldown
  Time taken_at_{}, refilled_at_{}, refill_after_{}, released_at_{};
};

// ---- HTTP

/// Returns the beginning of a text with tokens hidden, since a server may echo a request.
inline std::string shown(std::string text) {
  std::size_t digits = 0;
  for (std::size_t at = 0; at <= text.size(); ++at) {
    if (at < text.size() && std::isxdigit(static_cast<unsigned char>(text[at])) != 0) {
      ++digits;
    } else {
      if (digits >= 32)
        std::fill_n(text.begin() + static_cast<std::ptrdiff_t>(at - digits), digits, '*');
      digits = 0;
    }
  }
  return text.substr(0, 500);
}

/// The error that an answer means whose status is not 200.
inline Error failure(long status, const std::string& body, const std::string& url) {
  const auto parsed = json::parse(body, nullptr, false);
  const bool said = parsed.is_object() && parsed.contains("error") && parsed["error"].is_string();
  const auto text = shown(said ? parsed["error"].get<std::string>() : body);
  const auto says = [&](const char* words) { return text.find(words) != std::string::npos; };
  auto code = Code::PROTOCOL;
  if (status == 400) code = Code::INVALID_ARGUMENT;
  if (status == 413) code = Code::LIMIT_EXCEEDED;
  if (status == 500) code = Code::INTERNAL;
  if (status == 408 || status == 429 || (status >= 502 && status <= 504) || says("unknown model") ||
      says("is not healthy") || says("not ready") || says("Failed to process the requests")) {
    code = Code::UNAVAILABLE;
  }
  constexpr const char* MARK = "[CIDALLOC ";
  if (const auto at = text.find(MARK); at != std::string::npos) {
    const auto number = std::strtol(text.c_str() + at + std::strlen(MARK), nullptr, 10);
    const auto own = static_cast<Code>(number);
    return {name(own) != nullptr ? own : code, text.substr(text.find(' ', text.find(']', at)) + 1),
            true};
  }
  return {code, url + " answers with status " + std::to_string(status) + ": " + text};
}

struct Answer {
  Ids output;
  std::string detail;
};

/// The way to the server. Each request has a connection of its own, which is kept for later ones.
class Http {
 public:
  Http(const std::string& url, const Options& options)
      : url_(url.find("://") == std::string::npos ? "http://" + url : url),
        model_(options.model),
        headers_(options.headers),
        configure_(options.configure) {
    static const auto started = ::curl_global_init(CURL_GLOBAL_DEFAULT);
    const bool known = url_.rfind("http://", 0) == 0 || url_.rfind("https://", 0) == 0;
    if (started != CURLE_OK || !known) {
      throw Error(Code::INVALID_ARGUMENT, url + " is not of the form http(s)://host:port");
    }
    while (url_.back() == '/') url_.pop_back();
  }

  /// Sends a request to the manager. `parameters` may contain the token, which no error shows.
  Answer ask(Operation operation, const Ids& ids, const json& parameters, const std::string& slice,
             Duration limit) {
    const auto tensor = [](const char* name, const char* type, const auto& data) {
      return json{{"name", name}, {"datatype", type}, {"shape", {1, data.size()}}, {"data", data}};
    };
    const std::array<int, 1> code{static_cast<int>(operation)};
    const auto inputs = {tensor("CODE", "INT8", code), tensor("CORRELATION_ID", "UINT64", ids)};
    const json request{{"inputs", inputs}, {"parameters", parameters}};
    const auto body = request.dump(-1, ' ', false, json::error_handler_t::replace);
    return read(exchange(model_, "/infer", &body, slice, limit));
  }

  /// Returns the configuration of a model.
  json config(const std::string& model, const std::string& slice, Duration limit) {
    return exchange(model, "/config", nullptr, slice, limit);
  }

 private:
  using Handle = std::unique_ptr<CURL, decltype(&::curl_easy_cleanup)>;
  using List = std::unique_ptr<::curl_slist, decltype(&::curl_slist_free_all)>;

  [[nodiscard]] Error unlike(const std::string& what) const {
    return {Code::PROTOCOL, url_ + " answers unlike a cidalloc manager: " + what};
  }

  [[nodiscard]] Answer read(const json& body) const try {
    Answer answer;
    bool found = false;
    // Only Triton's own answers name a version. They may lack outputs, see below.
    const auto outputs =
        body.contains("model_version") ? body.value("outputs", json::array()) : body.at("outputs");
    for (const auto& output : outputs) {
      const auto& data = output.at("data");
      if (output.at("name") == "DETAIL") answer.detail = data.at(0).get<std::string>();
      if (output.at("name") != "OUTPUT") continue;
      const auto whole = [](const json& each) { return each.is_number_unsigned(); };
      if (!std::all_of(data.begin(), data.end(), whole)) throw unlike("its OUTPUT is not UINT64");
      data.get_to(answer.output);
      found = true;
    }
    // So does Triton 2.51, rarely, after a proxy has given requests up.
    if (!found) throw Error(Code::UNAVAILABLE, "no answer from " + url_ + ": it has no OUTPUT");
    return answer;
  } catch (const json::exception& error) {
    throw unlike(error.what());
  }

  /// Sends a request about a model, GET without a `body`, and returns the answer.
  json exchange(const std::string& model, const char* what, const std::string* body,
                const std::string& slice, Duration limit) {
    auto handle = take();
    CURL* const curl = handle.get();
    List list(nullptr, ::curl_slist_free_all);
    const auto add = [&](const std::string& header) {
      list.reset(::curl_slist_append(list.release(), header.c_str()));
    };
    add("Content-Type: application/json");
    for (const auto& each : headers_) add(each);
    if (!slice.empty()) add(protocol::ROUTE_HEADER + (": " + slice));
    const std::unique_ptr<char, decltype(&::curl_free)> escaped(
        ::curl_easy_escape(curl, model.data(), static_cast<int>(model.size())), ::curl_free);
    const auto url = url_ + "/v2/models/" + escaped.get() + what;
    std::string text;
    ::curl_easy_setopt(curl, CURLOPT_URL, url.c_str());
    ::curl_easy_setopt(curl, CURLOPT_HTTPHEADER, list.get());
    ::curl_easy_setopt(curl, CURLOPT_TIMEOUT_MS, std::max(limit.count(), Duration::rep{1}));
    ::curl_easy_setopt(curl, CURLOPT_WRITEDATA, &text);
    ::curl_easy_setopt(curl, CURLOPT_HTTPGET, 1L);
    if (body != nullptr) {
      ::curl_easy_setopt(curl, CURLOPT_POST, 1L);
      ::curl_easy_setopt(curl, CURLOPT_POSTFIELDSIZE_LARGE, static_cast<curl_off_t>(body->size()));
      ::curl_easy_setopt(curl, CURLOPT_POSTFIELDS, body->c_str());
    }
    if (const auto result = ::curl_easy_perform(curl); result != CURLE_OK) {
      const auto words = "no answer from " + url_ + ": " + ::curl_easy_strerror(result);
      const bool wrong = result == CURLE_URL_MALFORMAT || result == CURLE_UNSUPPORTED_PROTOCOL;
      throw Error(wrong ? Code::INVALID_ARGUMENT : Code::UNAVAILABLE, words);
    }  // otherwise the connection is used again
    long status = 0;
    ::curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &status);
    {
      const std::lock_guard lock(mutex_);
      idle_.push_back(std::move(handle));
    }
    if (status != 200) throw failure(status, text, url_);
    auto parsed = json::parse(text, nullptr, false);
    if (!parsed.is_object()) throw unlike(shown(text));
    return parsed;
  }

  Handle take() {
    {
      const std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        auto handle = std::move(idle_.back());
        idle_.pop_back();
        return handle;
      }
    }
    Handle handle(::curl_easy_init(), ::curl_easy_cleanup);
    CURL* const curl = handle.get();
    if (curl == nullptr) throw Error(Code::UNAVAILABLE, "libcurl cannot be used");
    const auto receive = [](char* data, std::size_t, std::size_t size, void* text) -> std::size_t {
      auto& body = *static_cast<std::string*>(text);
      if (body.size() + size > (64U << 20U)) return 0;  // this is no manager
      body.append(data, size);
      return size;
    };
    ::curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, +receive);
    ::curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    ::curl_easy_setopt(curl, CURLOPT_HTTP_VERSION, static_cast<long>(CURL_HTTP_VERSION_1_1));
    ::curl_easy_setopt(curl, CURLOPT_PROXY, "");
    if (configure_) configure_(curl);
    return handle;
  }

  std::string url_, model_;
  std::vector<std::string> headers_;
  std::function<void(CURL*)> configure_;
  std::mutex mutex_;
  std::vector<Handle> idle_;
};

// ---- The session

/// What a sequence needs to know of its model.
struct ModelInfo {
  Duration idle{0};    // Triton forgets a sequence after so long without a request
  bool exact = false;  // and not earlier
  Id highest = std::numeric_limits<std::int64_t>::max();  // Triton would cut a higher ID
  Time read_at{};
};

/// One session at the manager, and its IDs. A lease that was lost is never used again. Under the
/// lock of the session.
struct Lease {
  IdCache cache;
  Time deadline{}, renew_at{}, retry_at{};  // the IDs must not be used from `deadline` on
  Time first_sent = Time::max();            // of OPEN
  std::string token, registry, slice;
  std::string seen;                      // the latest stamp of the registry
  std::string lost_why;                  // empty while it has not ended
  std::uint64_t generation = 0;          // 0 before OPEN is answered, and once lost
  std::uint64_t seq = 0, sequences = 0;  // the last numbers
  Duration unended{0}, announced{0};  // cooldowns: the manager's default, that if this client dies
  Duration announcing{0};             // the latter, in a NEW without an answer
  std::set<std::string> models;       // of its sequences
  std::size_t announced_models = 0;
  std::size_t most = 1000;  // IDs in one DELETE
  bool doubtful = false;    // the result of a change is not known

  [[nodiscard]] bool to_renew(Time now) const {
    return now >= renew_at || models.size() > announced_models;
  }

  /// When the heartbeat has to do something next.
  [[nodiscard]] Time due(Time now) const {
    if (generation == 0) return Time::max();
    auto due = std::min(renew_at, cache.trim_at);
    if (now < deadline) due = doubtful || to_renew(now) ? now : std::min(due, cache.due(now));
    return std::max(due, retry_at);
  }

  void end(const std::string& why) {
    if (lost_why.empty()) lost_why = why;
    deadline = {};
    cache = IdCache();
  }
};

/// One client's session with its manager: one lease after the other. The private functions run
/// under the lock. Those that take it as an argument let go of it while they wait.
class Session {
 public:
  Session(const std::string& url, Options options)
      : options_(std::move(options)), http_(url, options_), lease_(new_lease()) {
    const auto day = std::chrono::hours(24);
    if (options_.ttl.count() < 1 || options_.timeout.count() < 1 || options_.timeout > day) {
      throw Error(Code::INVALID_ARGUMENT, "ttl and timeout are times of 1 ms to a day");
    }
    if (!options_.label.empty()) return;
    std::array<char, 256> host{};
    ::gethostname(host.data(), host.size() - 1);
    options_.label = std::string(host.data()) + " " + std::to_string(::getpid());
  }

  /// Starts the heartbeat. It takes no signals, and ends soon after `close`.
  static void start(const std::shared_ptr<Session>& session) {
    sigset_t all{};
    sigset_t before{};
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before);
    session->beating_ = true;
    bool started = true;
    try {
      std::thread([session] { session->heartbeat(); }).detach();
    } catch (const std::system_error&) {
      started = false;
    }
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (!started) throw Error(Code::UNAVAILABLE, "no thread can be started");
  }

  Id acquire() {
    Lock lock(mutex_);
    const auto time = now();
    const bool ready = time < lease_->deadline && lease_->unended <= lease_->announced;
    if (const Id id = ready ? lease_->cache.take(time) : 0) {
      if (lease_->cache.needs_refill) wake_.notify_one();
      return id;
    }
    return acquire(lock, 1, {}).first.front();
  }

  Ids acquire(std::size_t count) {
    if (count == 0) throw Error(Code::INVALID_ARGUMENT, "0 is not a number of IDs to acquire");
    Lock lock(mutex_);
    return acquire(lock, count, {}).first;
  }

  void release(const Id* ids, std::size_t count, Duration after) {
    const std::lock_guard lock(mutex_);
    check_open();
    if (after < UNENDED || after.count() > protocol::MAX_COOLDOWN_MS) {
      throw Error(Code::INVALID_ARGUMENT, "a cooldown is a time of 0 to 7 days");
    }
    if (count > 1 && std::set<Id>(ids, ids + count).size() < count) {
      throw Error(Code::DUPLICATE, "an ID is given twice in this call");
    }
    auto& cache = lease_->cache;
    for (const auto* id = ids; id != ids + count; ++id) {
      if (cache.uses(*id)) continue;
      const auto words = "ID " + std::to_string(*id);
      if (lost_.erase(*id) != 0) throw Error(Code::SESSION_EXPIRED, words + " had been lost");
      throw Error(Code::NOT_HELD, "this client does not hold " + words);
    }
    const auto cooldown = after == UNENDED ? lease_->unended : after;
    std::for_each(ids, ids + count, [&](Id id) { cache.give(id, cooldown, now()); });
    if (cache.outgoing()) wake_.notify_one();
  }

  Ids held() {
    const std::lock_guard lock(mutex_);
    Ids ids(lease_->cache.used().begin(), lease_->cache.used().end());
    std::sort(ids.begin(), ids.end());
    return ids;
  }

  json status() {
    Lock lock(mutex_);
    check_open();
    const auto slice = lease_->slice;
    lock.unlock();
    const auto answer = http_.ask(Operation::STATUS, {}, json::object(), slice, options_.timeout);
    auto found = json::parse(answer.detail, nullptr, false);
    if (!found.is_object()) throw Error(Code::PROTOCOL, "the manager's status is no JSON object");
    return found;
  }

  /// Releases all IDs and closes the session, in about `limit` at most.
  void close(Duration limit) {
    Lock lock(mutex_);
    const auto until = now() + limit;
    if (!std::exchange(closing_, true)) close(lock, until);
    changed_.wait_until(lock, until, [this] { return !beating_; });
  }

  void drop() { close(seconds(2)); }

 private:
  friend class SequenceState;
  using Taken = std::pair<Ids, std::shared_ptr<Lease>>;

  /// While it lives, no other thread changes what the session holds.
  class Turn {
   public:
    Turn(Session& session, Lock& lock, Time until) : session_(session) {
      if (!session.changed_.wait_until(lock, until, [&] { return !session.busy_; })) {
        throw Error(Code::UNAVAILABLE, "no answer in time: other requests come first");
      }
      session.busy_ = true;
    }
    ~Turn() {
      session_.busy_ = false;
      session_.changed_.notify_all();
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    Session& session_;
  };

  void check_open() const {
    if (closed_) throw Error(Code::INVALID_ARGUMENT, "this client is closed");
  }

  void log(const std::string& line) const {
    if (options_.log) options_.log(line);
  }

  [[nodiscard]] Duration limit(Time until) const {
    const auto left = std::chrono::duration_cast<Duration>(until - now());
    return std::min(options_.timeout, std::max(left, options_.timeout / 16));
  }

  /// A time between these, which differs between clients.
  Duration between(Duration low, Duration high) {
    return Duration(std::uniform_int_distribution(low.count(), high.count())(random_));
  }

  Duration pause(int tries) {
    const auto most = std::min(Duration(50U << std::min(tries - 1U, 6U)), Duration(2000));
    return between(std::min(most, options_.ttl / 8) / 2, std::min(most, options_.ttl / 8));
  }

  [[nodiscard]] std::shared_ptr<Lease> new_lease() const {
    auto lease = std::make_shared<Lease>();
    lease->cache = IdCache(options_.ahead);
    std::random_device random;
    std::array<char, 33> text{};
    std::snprintf(text.data(), text.size(), "%08x%08x%08x%08x", random(), random(), random(),
                  random());
    lease->token = text.data();
    return lease;
  }

  // ---- IDs from the cache or from the manager

  /// Returns so many IDs and their lease. `need` is their cooldown if this client dies.
  Taken acquire(Lock& lock, std::size_t count, std::optional<Duration> need) {
    const auto until = now() + options_.timeout;
    for (int tries = 1;; ++tries) {
      try {
        establish(lock, until);
        const auto lease = lease_;
        const auto cooldown = need.value_or(lease->unended);
        auto ids = take_ready(*lease, count, cooldown);
        if (ids.empty()) {
          const Turn turn(*this, lock, until);
          ids = take_ready(*lease, count, cooldown);  // another thread may have been faster
          if (ids.empty()) ids = fetch(lock, *lease, count, cooldown, until);
        }
        if (!ids.empty()) return {ids, lease};
        if (now() >= until) throw Error(Code::UNAVAILABLE, "other calls took the IDs");
      } catch (const Error& error) {
        recover(lock, error, tries, until);
      }
    }
  }

  static Ids take_ready(Lease& lease, std::size_t count, Duration cooldown) {
    const auto time = now();
    const bool valid = time < lease.deadline && cooldown <= lease.announced;
    Ids ids;
    if (!valid || lease.cache.ready(time, count) < count) return ids;
    while (ids.size() < count) ids.push_back(lease.cache.take(time));
    return ids;
  }

  /// Asks for the IDs that the cache lacks, and for some ahead. In turn. Returns none if they are
  /// in the cache now, or if the lease has ended.
  Ids fetch(Lock& lock, Lease& lease, std::size_t count, Duration need, Time until) {
    if (lease.doubtful) reconcile(lock, lease, until);
    auto& cache = lease.cache;
    const auto cooldown = std::max(lease.announced, need);
    const auto ready = std::min(count, cache.ready(now(), count));
    if (ready == count && count > 0) {
      if (cooldown > lease.announced) renew(lock, lease, until, cooldown);
      lease.announced = cooldown;
      return take_ready(lease, count, cooldown);
    }
    const auto lacking = count - ready;
    for (auto ahead = cache.plan(now(), ready); lacking + ahead > 0; ahead = 0) {
      lease.announcing = cooldown;
      const json what{{"count", lacking + ahead},
                      {"cooldown_ms", cooldown.count()},
                      {"used", cache.used().size() + count}};
      try {
        const auto ids = ask(lock, lease, Operation::NEW, until, what).output;
        if (ids.size() != lacking + ahead || std::count(ids.begin(), ids.end(), Id{0}) != 0) {
          throw Error(Code::PROTOCOL, "NEW was not answered with so many IDs");
        }
        lease.announced = cooldown;
        return hand_out(lease, ids, lacking, ready);
      } catch (const Error& error) {
        const bool scarce = error.code() == Code::EXHAUSTED || error.code() == Code::LIMIT_EXCEEDED;
        if (scarce) cache.refill_failed(now());
        if (!scarce || ahead == 0 || lacking == 0) throw;
      }
    }
    return {};
  }

  /// Returns `lacking` new IDs and `ready` cached ones, if those are still there; caches the rest.
  Ids hand_out(Lease& lease, const Ids& ids, std::size_t lacking, std::size_t ready) {
    auto& cache = lease.cache;
    const auto time = now();
    const bool complete = time < lease.deadline && cache.ready(time, ready) >= ready;
    const auto own = complete ? lacking : 0;
    Ids found(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(own));
    for (std::size_t i = 0; complete && i < ready; ++i) found.push_back(cache.take(time));
    cache.refill(ids, own, time);
    for (const Id id : ids) lost_.erase(id);
    lease.doubtful = false;
    return found;
  }

  /// Asks the manager what the session holds, after an answer was lost. In turn.
  void reconcile(Lock& lock, Lease& lease, Time until) {
    const auto held = ask(lock, lease, Operation::HELD, until).output;
    const auto [lost, found] = lease.cache.reconcile({held.begin(), held.end()});
    if (found) lease.announced = std::max(lease.announced, lease.announcing);
    for (const Id id : held) lost_.erase(id);
    for (const Id id : lost) log("ID " + std::to_string(id) + " is not the session's any more");
    lost_.insert(lost.begin(), lost.end());
    lease.doubtful = false;
  }

  /// Releases at the manager the IDs that have to leave. In turn.
  void give_back(Lock& lock, Lease& lease, Time until) {
    for (;;) {
      if (lease.doubtful) reconcile(lock, lease, until);
      lease.cache.send(lease.most, now());
      const auto ids = lease.cache.releasing;
      if (ids.empty()) return;
      const auto after = lease.cache.releasing_for;
      const json how =
          after == ENDED ? json{{"ended", true}} : json{{"cooldown_ms", after.count()}};
      try {
        ask(lock, lease, Operation::DELETE, until, how, ids);
        lease.cache.releasing.clear();
        lease.doubtful = false;
      } catch (const Error& error) {
        const auto code = error.code();
        const bool wrong =  // about what the session holds
            code == Code::NOT_HELD || code == Code::NOT_OWNER || code == Code::OUT_OF_RANGE;
        if (!wrong && code != Code::LIMIT_EXCEEDED) throw;
        if (wrong) lease.doubtful = true;
        if (code == Code::LIMIT_EXCEEDED && ids.size() == 1) lease.cache.keep();
        if (code == Code::LIMIT_EXCEEDED) lease.most = std::max<std::size_t>(1, ids.size() / 8);
      }
    }
  }

  // ---- Requests of the session

  /// Sends a request of the session, and notes what its answer says of the session. A change (NEW,
  /// DELETE) leaves the lease doubtful if its result is not known; after a success the caller notes
  /// the result, and that there is no doubt.
  Answer ask(Lock& lock, Lease& lease, Operation operation, Time until, json what = json::object(),
             const Ids& ids = {}) {
    const bool opening = operation == Operation::OPEN;
    const bool closing = operation == Operation::CLOSE;
    const bool change = operation == Operation::NEW || operation == Operation::DELETE;
    const auto check_known = [&] {
      if (!closing && !lease.lost_why.empty()) throw Error(Code::SESSION_UNKNOWN, lease.lost_why);
    };
    check_known();
    const auto sent = now();
    what["session"] = lease.token;
    what["seen"] = lease.seen;
    if (!opening) {
      what["registry"] = lease.registry;
      what.emplace("used", lease.cache.used().size());
    }
    if (change || operation == Operation::HELD) {
      what["seq"] = ++lease.seq;
      lease.doubtful = true;  // until an answer tells the result
    }
    const auto slice = opening ? std::string() : lease.slice;
    const auto limit = this->limit(until);
    try {
      auto answer = [&] {
        const Unlocked unlocked(lock);
        return http_.ask(operation, ids, what, slice, limit);
      }();
      met_ = true;
      check_known();
      read_detail(lease, answer.detail);
      if (!opening && !closing) renewed(lease, sent);
      return answer;
    } catch (const Error& error) {
      met_ = met_ || error.answered();
      check_known();
      if (error.code() == Code::DRAINING) lease.cache.drain(true);
      if (error.code() == Code::SESSION_UNKNOWN) lose(lease, "the manager does not know it");
      // Triton refuses some requests by itself; those never reached the manager.
      const bool undone = error.answered() || error.code() == Code::INVALID_ARGUMENT;
      if (undone && change && error.code() != Code::REPEATED) lease.doubtful = false;
      throw;
    }
  }

  /// Notes whether the server is being drained, and the stamp of the registry's state.
  static void read_detail(Lease& lease, const std::string& detail) {
    bool draining = false;
    std::istringstream words(detail);
    for (std::string word; words >> word;) {
      if (word == protocol::DRAINING) draining = true;
      if (word.size() == std::size_t{protocol::STAMP_DIGITS})
        lease.seen = std::max(lease.seen, word);
    }
    lease.cache.drain(draining);
  }

  void renewed(Lease& lease, Time sent) {
    lease.deadline = std::max(lease.deadline, sent + options_.ttl);
    lease.renew_at = sent + between(options_.ttl / 4, options_.ttl * 7 / 20);
    lease.retry_at = {};
  }

  void open(Lock& lock, Lease& lease, Time until) {
    lease.first_sent = std::min(lease.first_sent, now());
    const json what{{"ttl_ms", options_.ttl.count()}, {"label", options_.label}};
    const auto answer = ask(lock, lease, Operation::OPEN, until, what).output;
    if (answer.size() < 7 || answer[0] != protocol::PROTOCOL || answer[1] == 0) {
      throw Error(Code::PROTOCOL, "OPEN was answered by a manager of another version");
    }
    const unsigned long long high = answer[3];
    const unsigned long long low = answer[4];
    std::array<char, 37> uuid{};
    std::snprintf(uuid.data(), uuid.size(), "%08llx-%04llx-%04llx-%04llx-%012llx", high >> 32U,
                  high >> 16U & 0xffffU, high & 0xffffU, low >> 48U, low & 0xffffffffffffU);
    lease.registry = uuid.data();
    lease.cache.cooldown = Duration(answer[5]);
    lease.unended = Duration(answer[6]);
    if (answer.size() > 8 && answer[8] != 0) lease.slice = std::to_string(answer[7]);
    // The first OPEN of this token that arrived began the session; later ones renew nothing.
    renewed(lease, lease.first_sent);
    lease.generation = answer[1];
    wake_.notify_one();
  }

  /// Renews the lease, and announces this cooldown of the IDs if this client dies.
  void renew(Lock& lock, Lease& lease, Time until, std::optional<Duration> announced = {}) {
    json what = json::object();
    if (announced) what["cooldown_ms"] = announced->count();
    const auto models = lease.models.size();
    if (models != 0) what["models"] = json(lease.models).dump();
    const auto answer = ask(lock, lease, Operation::RENEW, until, what).output;
    lease.announced_models = models;
    if (answer.empty() || answer[0] != lease.generation) {
      // A late OPEN made that session, and it holds no ID of this one.
      lose(lease, "the manager has another session under its name");
      throw Error(Code::SESSION_UNKNOWN, lease.lost_why);
    }
    if (answer.size() > 2 && answer[2] != 0) lease.cache.trim(now(), true);
  }

  void lose(Lease& lease, const std::string& why) {
    if (lease.lost_why.empty()) log("the session was lost: " + why);
    lost_.insert(lease.cache.used().begin(), lease.cache.used().end());
    lease.end("the session was lost: " + why);
    lease.generation = 0;
    lease.slice.clear();
  }

  /// Opens a session if there is none, and renews the lease if it has run out.
  void establish(Lock& lock, Time until) {
    check_open();
    if (now() < lease_->deadline) return;
    const Turn turn(*this, lock, until);
    check_open();
    const bool spent = !lease_->lost_why.empty() || now() - options_.ttl >= lease_->first_sent;
    if (lease_->generation == 0 && spent) lease_ = new_lease();
    const auto lease = lease_;
    if (lease->generation == 0) {
      open(lock, *lease, until);
    } else if (now() >= lease->deadline) {
      try {
        renew(lock, *lease, until);
      } catch (const Error& error) {
        if (error.code() != Code::UNAVAILABLE) throw;
        if (lease->slice.empty()) throw expired(error.what());
        // Behind a proxy: open a session on the server that it chooses, and give this one up.
        auto other = new_lease();
        open(lock, *other, until);
        lose(*lease, "its server did not answer");
        lease_ = std::move(other);
      }
    }
    if (now() >= lease_->deadline) throw expired("the manager answers too late");
  }

  [[nodiscard]] Error expired(const std::string& why) const {
    const auto ttl = std::to_string(options_.ttl.count());
    return {Code::SESSION_EXPIRED, "no heartbeat was answered for " + ttl + " ms; " + why};
  }

  /// Returns when another try may help; throws the error if none can help in time.
  void recover(Lock& lock, const Error& error, int tries, Time until) {
    const auto code = error.code();
    if (code == Code::REGISTRY_MISMATCH) return probe(lock, error, until);
    const bool cured = code == Code::SESSION_UNKNOWN || code == Code::REPEATED;
    if (cured && tries <= 3) return;  // by a new session, or a new number
    const bool passes = cured || code == Code::UNAVAILABLE || code == Code::SESSION_EXPIRED;
    const auto next = now() + pause(tries);
    // A manager that has never answered probably has another address.
    if (!passes || !met_ || next >= until) throw Error(error);
    changed_.wait_until(lock, next, [&] { return closed_; });
  }

  /// Finds out whether another registry has replaced the lease's own; throws if both answer.
  void probe(Lock& lock, const Error& error, Time until) {
    const auto lease = lease_;
    for (int i = 0; i < 3; ++i) {
      try {
        renew(lock, *lease, until);
      } catch (const Error& again) {
        if (again.code() == Code::REGISTRY_MISMATCH) continue;
        return;
      }
      throw Error(error);
    }
    if (lease->lost_why.empty()) lose(*lease, "another registry answers");
  }

  /// Returns what is known of a model; it is at most 30 s old.
  ModelInfo model_info(const std::string& model) {
    Lock lock(mutex_);
    check_open();
    const auto time = now();
    const auto known = models_.find(model);
    if (known != models_.end() && time - known->second.read_at < seconds(30)) return known->second;
    const auto slice = lease_->slice;
    const auto config = [&] {
      const Unlocked unlocked(lock);
      return http_.config(model, slice, options_.timeout);
    }();
    try {
      return models_[model] = read(config, time);
    } catch (const json::exception& error) {
      throw Error(Code::PROTOCOL, "the configuration of model " + model + ": " + error.what());
    }
  }

  static ModelInfo read(const json& config, Time time) {
    const auto batching = config.value("sequence_batching", json::object());
    if (batching.empty() || batching.value("iterative_sequence", false)) {
      throw Error(
          Code::INVALID_ARGUMENT,
          "this model has no sequence_batching, or is iterative: if it keeps sequences, say "
          "with cooldown when it has forgotten them");
    }
    ModelInfo info;
    info.read_at = time;
    info.exact = true;
    const auto idle = batching.value("max_sequence_idle_microseconds", std::int64_t{0});
    info.idle = std::chrono::ceil<Duration>(std::chrono::microseconds(idle == 0 ? 1000000 : idle));
    for (const auto& input : batching.value("control_input", json::array())) {
      for (const auto& control : input.at("control")) {
        if (control.at("kind") != "CONTROL_SEQUENCE_CORRID") continue;
        const auto& type = control.at("data_type");
        if (type == "TYPE_STRING") throw Error(Code::INVALID_ARGUMENT, "this model's IDs are text");
        if (type == "TYPE_INT32") info.highest = std::numeric_limits<std::int32_t>::max();
        if (type == "TYPE_UINT32") info.highest = std::numeric_limits<std::uint32_t>::max();
      }
    }
    return info;
  }

  // ---- The heartbeat, and the end

  /// Renews the lease, refills the cache and releases IDs until the session is closed.
  void heartbeat() {
    Lock lock(mutex_);
    for (int tries = 0; !closed_;) {
      const auto lease = lease_;
      if (const auto due = lease->due(now()); due > now()) {
        wake_.wait_until(lock, std::min(due, now() + std::chrono::hours(1)));
        continue;
      }
      // Short enough for some tries before the lease runs out.
      const auto until = now() + std::min(options_.timeout, options_.ttl / 8);
      try {
        beat(lock, *lease, until);
        tries = 0;
      } catch (const std::exception& error) {
        lease->retry_at = now() + pause(++tries);
        if (!closed_) log(std::string("a heartbeat failed: ") + error.what());
      }
    }
    beating_ = false;
    changed_.notify_all();
  }

  void beat(Lock& lock, Lease& lease, Time until) {
    if (lease.to_renew(now())) {
      try {
        return renew(lock, lease, until);
      } catch (const Error& error) {
        if (error.code() != Code::REGISTRY_MISMATCH) throw;
        return probe(lock, error, until);
      }
    }
    const Turn turn(*this, lock, until);
    auto& cache = lease.cache;
    if (now() >= cache.trim_at || cache.draining) cache.trim(now());
    give_back(lock, lease, until);
    if (std::exchange(cache.needs_refill, false)) fetch(lock, lease, 0, Duration(0), until);
  }

  void close(Lock& lock, Time until) {
    try {
      const Turn turn(*this, lock, until);
      const auto lease = lease_;
      if (now() < lease->deadline && lease->cache.outgoing()) give_back(lock, *lease, until);
    } catch (const Error& error) {
      log(std::string("could not release IDs before closing: ") + error.what());
    }
    const auto lease = lease_;
    const auto& cache = lease->cache;
    const bool ended = cache.used().empty() && !cache.outgoing() && !lease->doubtful;
    closed_ = true;
    lease->end("the client was closed");
    wake_.notify_one();
    changed_.notify_all();
    if (lease->generation == 0) return;
    try {
      ask(lock, *lease, Operation::CLOSE, until, {{"ended", ended}});
    } catch (const Error& error) {
      log(std::string("the session ends with its lease, since ") + error.what());
    }
  }

  Options options_;
  Http http_;
  std::mutex mutex_;
  std::condition_variable wake_;                    // for the heartbeat
  std::condition_variable changed_;                 // for all others
  std::mt19937_64 random_{std::random_device{}()};  // for pauses
  std::shared_ptr<Lease> lease_;
  std::unordered_set<Id> lost_;  // IDs in use when their session was lost
  std::map<std::string, ModelInfo> models_;
  bool busy_ = false, met_ = false, beating_ = false, closing_ = false, closed_ = false;
};

// ---- Sequences

/// The state of a sequence, which decides where its ID goes. Its requests share it.
class SequenceState {
 public:
  SequenceState(std::shared_ptr<Session> session, const std::string& model,
                const SequenceOptions& options)
      : timeout(options.timeout), session_(std::move(session)) {
    if (options.cooldown) info_.idle = *options.cooldown;
    if (!options.cooldown) info_ = session_->model_info(model);
    const auto need = info_.idle + timeout;
    if (timeout.count() < 1 || info_.idle.count() < 0 || need.count() > protocol::MAX_COOLDOWN_MS) {
      throw Error(Code::INVALID_ARGUMENT, "timeout and cooldown are together at most 7 days");
    }
    Lock lock(session_->mutex_);
    auto [ids, lease] = session_->acquire(lock, 1, need);
    id = ids.front();
    lease_ = std::move(lease);
    if (id > info_.highest) {
      lease_->cache.give(id, ENDED, now());
      throw Error(Code::INVALID_ARGUMENT, model + " takes no IDs as high as those of this pool");
    }
    const bool nameable = !model.empty() && model.size() <= 256;
    if (nameable && lease_->models.size() < protocol::MAX_MODELS) lease_->models.insert(model);
    if (lease_->models.size() > lease_->announced_models) session_->wake_.notify_one();
    key = lease_->registry.substr(24) + "-" + std::to_string(id) + "-" +
          std::to_string(lease_->generation) + "-" + std::to_string(++lease_->sequences);
  }

  Duration timeout;
  Id id = 0;
  std::string key;

  [[nodiscard]] std::string slice() const {
    const std::lock_guard lock(session_->mutex_);
    return lease_->slice;
  }

  /// Notes that a request is sent now, and returns whether it carries START.
  bool send(bool end) {
    const std::lock_guard lock(session_->mutex_);
    session_->check_open();
    if (closed_ || ending_) {
      throw Error(Code::INVALID_ARGUMENT, "sequence " + key + " takes no more requests");
    }
    const auto time = now();
    if (!lease_->cache.uses(id)) {
      throw Error(Code::SEQUENCE_LOST, "ID " + std::to_string(id) + ": " + lease_->lost_why);
    }
    if (time >= lease_->deadline) throw session_->expired("another client may have the ID");
    const bool settled = unanswered_ == 0 && answered_ && !doubtful_;
    if (info_.exact && settled && time > last_answered_ + info_.idle + Duration(500)) {
      throw Error(Code::SEQUENCE_LOST, "nothing was sent for the idle time of the model");
    }
    ending_ = end;
    ++unanswered_;
    return !answered_ && unanswered_ == 1;
  }

  /// Notes the end of a request. One that was not answered may be applied already, or later.
  void settle(bool end, bool answered) {
    const std::lock_guard lock(session_->mutex_);
    --unanswered_;
    answered_ = answered_ || answered;
    doubtful_ = doubtful_ || !answered;
    if (answered) last_answered_ = now();
    if (end) (answered ? ended_ : ending_) = answered;
    if (certain()) release();
  }

  void drop() {
    const std::lock_guard lock(session_->mutex_);
    release();
  }

 private:
  /// Whether Triton has certainly ended it.
  [[nodiscard]] bool certain() const { return ended_ && !doubtful_ && unanswered_ == 0; }

  void release() {
    if (std::exchange(closed_, true)) return;
    auto& cache = lease_->cache;
    const bool fresh = !answered_ && unanswered_ == 0 && !doubtful_;
    if (cache.uses(id)) {
      cache.give(id, fresh || certain() ? ENDED : info_.idle + timeout, now());
    } else {
      session_->lost_.erase(id);
    }
    if (cache.outgoing()) session_->wake_.notify_one();
  }

  std::shared_ptr<Session> session_;
  std::shared_ptr<Lease> lease_;
  ModelInfo info_;
  int unanswered_ = 0;
  bool answered_ = false, doubtful_ = false, ending_ = false, ended_ = false, closed_ = false;
  Time last_answered_{};
};

/// A request of a sequence that was noted as sent.
struct Sent {
  std::shared_ptr<SequenceState> sequence;
  bool end, start, settled = false;

  void settle(bool answered) {
    if (!std::exchange(settled, true)) sequence->settle(end, answered);
  }
  void drop() { settle(false); }
};

}  // namespace detail

// ---- What an application uses

/// One request of a sequence, which the application sends at once, with these values in its
/// options. Call `answered` when Triton has answered with success. If this object goes without
/// that, the outcome is in doubt: the sequence can go on, but its ID cools after it.
class Request {
 public:
  [[nodiscard]] Id id() const { return sent_->sequence->id; }
  [[nodiscard]] bool start() const { return sent_->start; }
  [[nodiscard]] bool end() const { return sent_->end; }
  /// Triton's `timeout` of the request, which is a number of microseconds.
  [[nodiscard]] std::chrono::microseconds timeout() const { return sent_->sequence->timeout; }

  /// Notes that the request was answered with success. With END, this releases the ID.
  void answered() { sent_->settle(true); }

 private:
  friend class Sequence;
  explicit Request(const detail::Sent& sent) : sent_(std::make_shared<detail::Sent>(sent)) {}
  detail::Owner<detail::Sent> sent_;
};

/// A sequence with its own correlation ID; `Client::sequence` makes it. The ID is released when END
/// was answered with success, no request is unanswered, and none was in doubt. Otherwise it is
/// released with this object, and cools until Triton has certainly forgotten the sequence.
class Sequence {
 public:
  /// The correlation ID.
  [[nodiscard]] Id id() const { return state_->id; }
  /// A short name for logs. IDs are used again, but no two sequences ever have the same key.
  [[nodiscard]] const std::string& key() const { return state_->key; }
  /// The headers that its requests need behind a proxy; may be empty.
  [[nodiscard]] std::map<std::string, std::string> headers() const {
    const auto slice = state_->slice();
    if (slice.empty()) return {};
    return {{protocol::ROUTE_HEADER, slice}};
  }

  /// Notes the next request; with `end` it is the last one. Throws SEQUENCE_LOST (Triton has
  /// forgotten the sequence, or its ID was lost: open a new one, and send everything again),
  /// SESSION_EXPIRED (no heartbeat was answered for the TTL; a later one may change that), and
  /// INVALID_ARGUMENT (END was sent, or the sequence or the client is closed).
  Request next(bool end = false) {
    const bool start = state_->send(end);
    return Request({state_.get(), end, start});
  }

  /// Releases the ID. A second call does nothing.
  void close() { state_->drop(); }

 private:
  friend class Client;
  explicit Sequence(std::shared_ptr<detail::SequenceState> state) : state_(std::move(state)) {}
  detail::Owner<detail::SequenceState> state_;
};

/// A client of the manager on a Triton server. Create one for each process; all threads can share
/// it. It opens a session when it first needs one, renews it in a thread of its own, and closes it
/// when it is destroyed, in two seconds at most.
///
/// Every method may throw `Error`, among others with UNAVAILABLE (the manager does not answer),
/// SESSION_EXPIRED (no heartbeat was answered for the TTL), REGISTRY_MISMATCH (several managers
/// answer), INVALID_ARGUMENT (of an argument, or after `close`) and FORKED (in a forked child).
class Client {
 public:
  /// `url` is http://host:port or https://host:port, maybe with a path. This sends nothing.
  explicit Client(const std::string& url, Options options = {})
      : session_(std::make_shared<detail::Session>(url, std::move(options))) {
    detail::Session::start(session_.get());
  }

  /// Returns an ID, usually out of the ID cache. Throws EXHAUSTED (the pool has no free ID) and
  /// DRAINING.
  Id acquire() { return session_->acquire(); }
  /// Returns so many IDs, all or none. Throws as `acquire`, and LIMIT_EXCEEDED.
  Ids acquire_many(std::size_t count) { return session_->acquire(count); }

  /// Releases an ID; never waits for the manager. `cooldown` is the time after which Triton has
  /// certainly forgotten the sequence, or ENDED or UNENDED. Throws NOT_HELD (this client does not
  /// hold the ID) and SESSION_EXPIRED (the ID was lost with its session).
  void release(Id id, Duration cooldown = UNENDED) { session_->release(&id, 1, cooldown); }
  /// Releases several IDs, all or none. Throws as `release`, and DUPLICATE.
  void release_many(const Ids& ids, Duration cooldown = UNENDED) {
    session_->release(ids.data(), ids.size(), cooldown);
  }

  /// Begins a sequence on a model. Throws as `acquire`, and INVALID_ARGUMENT if the model keeps no
  /// sequences, or takes no IDs as high as those of the pool.
  [[nodiscard]] Sequence sequence(const std::string& model, const SequenceOptions& options = {}) {
    return Sequence(std::make_shared<detail::SequenceState>(session_.get(), model, options));
  }

  /// Returns the IDs in use, in order: acquired and not released. Needs no round trip.
  [[nodiscard]] Ids held() const { return session_->held(); }
  /// Returns the manager's status; docs/protocol.md describes it.
  [[nodiscard]] nlohmann::json status() const { return session_->status(); }

  /// Releases all IDs and closes the session, in `limit` at most; IDs in use cool. If the manager
  /// does not answer, it does so when the lease ends. A second call does nothing.
  void close(Duration limit = std::chrono::seconds(10)) { session_->close(limit); }

 private:
  detail::Owner<detail::Session> session_;
};

}  // namespace cidalloc
