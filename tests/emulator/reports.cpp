// What went wrong: kept until Python asks for it (extern "C", at the foot).
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <set>
#include <vector>

#include "emulator.h"

namespace emulator {
namespace {

constexpr size_t kMostReports = 100;

std::mutex mutex;
std::vector<std::string> reports;
std::set<std::string> seen;  // one report of a kind for each instruction

// "library+0x123", from which addr2line finds the line of the source.
std::string place_of(const void* code) {
  Dl_info info{};
  if (code == nullptr || dladdr(code, &info) == 0) {
    return "";
  }
  const auto offset = static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase);
  return format(" [%s+0x%zx]", info.dli_fname, static_cast<size_t>(offset) - 1);
}

}  // namespace

std::string format(const char* text, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, text);
  vsnprintf(buffer, sizeof(buffer), text, arguments);
  va_end(arguments);
  return buffer;
}

void report(const std::string& what, const void* code) {
  std::string where;
  if (current != nullptr) {
    where =
        format(": %s, block %u, thread %u", running_kernel, current->block.x, current->thread.x);
  }
  const auto place = place_of(code);
  const std::lock_guard<std::mutex> lock(mutex);
  const std::string kind = what.substr(0, what.find('('));
  if (reports.size() < kMostReports && seen.insert(kind + running_kernel + place).second) {
    reports.push_back(what + where + place);
  }
}

}  // namespace emulator

// Moves the reports, a line each, to `to`, and forgets them.
extern "C" void emulator_take_reports(char* to, size_t room) {
  using namespace emulator;
  const std::lock_guard<std::mutex> lock(mutex);
  std::string all;
  for (const auto& line : reports) {
    all += line + "\n";
  }
  reports.clear();
  seen.clear();
  snprintf(to, room, "%s", all.c_str());
}
