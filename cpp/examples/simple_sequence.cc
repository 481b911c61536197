// Two sequences side by side on the demo's model, which adds up what each of them sends.
//
//     cidalloc serve & ; simple_sequence http://localhost:8000
//
// The client gives the IDs. The requests are the program's own, here with libcurl.
#include <curl/curl.h>

#include <array>
#include <cidalloc.hpp>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

namespace {

using nlohmann::json;

class Model {
 public:
  explicit Model(const std::string& server)
      : url_(server + "/v2/models/simple_sequence/infer"),
        curl_(::curl_easy_init(), ::curl_easy_cleanup) {}

  /// Sends the next value of a sequence and returns the sum.
  int add(cidalloc::Sequence& sequence, int value, bool last) {
    auto request = sequence.next(last);
    json body;
    body["inputs"] = {
        {{"name", "INPUT"}, {"datatype", "INT32"}, {"shape", {1, 1}}, {"data", {value}}}};
    body["parameters"] = {{"sequence_id", request.id()},
                          {"sequence_start", request.start()},
                          {"sequence_end", request.end()},
                          {"timeout", request.timeout().count()}};
    const auto answer = json::parse(post(body.dump()));
    if (answer.contains("error")) throw std::runtime_error(answer["error"].get<std::string>());
    request.answered();
    return answer["outputs"][0]["data"][0].get<int>();
  }

 private:
  std::string post(const std::string& body) {
    std::string answer;
    const auto receive = [](char* data, std::size_t, std::size_t size, void* text) -> std::size_t {
      static_cast<std::string*>(text)->append(data, size);
      return size;
    };
    ::curl_easy_setopt(curl_.get(), CURLOPT_URL, url_.c_str());
    ::curl_easy_setopt(curl_.get(), CURLOPT_POSTFIELDS, body.c_str());
    ::curl_easy_setopt(curl_.get(), CURLOPT_WRITEFUNCTION, +receive);
    ::curl_easy_setopt(curl_.get(), CURLOPT_WRITEDATA, &answer);
    const auto result = ::curl_easy_perform(curl_.get());
    if (result != CURLE_OK) throw std::runtime_error(::curl_easy_strerror(result));
    return answer;
  }

  std::string url_;
  std::unique_ptr<CURL, decltype(&::curl_easy_cleanup)> curl_;
};

}  // namespace

int main(int argc, char** argv) try {
  const std::string server = argc > 1 ? argv[1] : "http://localhost:8000";
  cidalloc::Client cids(server);
  Model model(server);
  auto first = cids.sequence("simple_sequence");
  auto second = cids.sequence("simple_sequence");
  std::cout << "Have Correlation Id: " << first.id() << "\nHave Correlation Id: " << second.id()
            << "\nfirst : second\n";
  constexpr std::array<int, 8> FIRST{0, 11, 7, 5, 3, 2, 0, 1};
  for (std::size_t step = 0; step < FIRST.size(); ++step) {
    const bool last = step == FIRST.size() - 1;
    std::cout << "[" << step << "] " << model.add(first, FIRST[step], last) << " : "
              << model.add(second, step == 0 ? 100 : -FIRST[step], last) << "\n";
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
