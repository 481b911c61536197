// The C++ client as a program of `cidalloc conformance`: one line in, one line out.

#include <chrono>
#include <cidalloc.hpp>
#include <exception>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

namespace {

using cidalloc::Client;
using cidalloc::Id;
using cidalloc::Sequence;

/// Each ID is that of a sequence on the model `sequence`, which the kit serves. Its requests are
/// only noted, not sent: END counts as answered.
class Adapter {
 public:
  std::string run(const std::string& name, std::istringstream& words) {
    std::string said;
    if (name == "open") {
      std::string url;
      long ttl = 0;
      words >> url >> ttl;
      cidalloc::Options options;
      options.ttl = std::chrono::milliseconds(ttl);
      options.timeout = std::chrono::seconds(1);
      sequences_.clear();
      client_ = std::make_unique<Client>(url, options);
    } else if (name == "acquire") {
      std::size_t count = 0;
      words >> count;
      cidalloc::SequenceOptions options;
      options.timeout = std::chrono::seconds(1);
      std::vector<Sequence> found;
      while (found.size() < count) found.push_back(client_->sequence("sequence", options));
      for (auto& each : found) {
        const Id id = each.id();
        said += " " + std::to_string(id);
        sequences_.insert_or_assign(id, std::move(each));
      }
    } else if (name == "use") {
      at(words).next().answered();
    } else if (name == "release") {
      auto& sequence = at(words);
      const Id id = sequence.id();
      std::string how;
      words >> how;
      auto mine = std::move(sequences_.extract(id).mapped());
      if (how == "ended") mine.next(true).answered();
    } else if (name == "close") {
      client_->close();
    }
    return said;
  }

 private:
  Sequence& at(std::istringstream& words) {
    Id id = 0;
    words >> id;
    return sequences_.at(id);
  }

  std::unique_ptr<Client> client_;
  std::map<Id, Sequence> sequences_;
};

}  // namespace

int main() try {
  Adapter adapter;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string name;
    words >> name;
    try {
      const auto said = adapter.run(name, words);
      std::cout << "ok" << said << std::endl;
    } catch (const cidalloc::Error& error) {
      std::cout << "error " << error.what() << std::endl;
    }
  }
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 1;
}
