// A model in one file, verified; darcnn.runtime.bundle refuses the same.
#pragma once

#include <cstdint>

#include "darcnn.h"
#include "manifest.hpp"

namespace darcnn {

// The one exception of the library, `where: problem; fix` in one line; it ends at the C border.
struct Error : std::runtime_error {
    Error(darcnn_status status, const std::string &where, const std::string &problem, const std::string &fix)
        : std::runtime_error(where + ": " + problem + "; " + fix), status(status) {}
    darcnn_status status;
};

// Holds the whole file in memory: what happens to it afterwards does not matter.
class Bundle {
  public:
    explicit Bundle(const std::string &path);  // throws Error
    Bundle(const Bundle &) = delete;           // the members point into the content
    Bundle &operator=(const Bundle &) = delete;

    const std::string &path() const { return path_; }
    const Manifest &manifest() const { return manifest_; }
    std::string_view content() const { return content_; }
    std::string_view member(const std::string &name) const { return members_.at(name); }

  private:
    std::string path_, content_;
    std::map<std::string, std::string_view> members_;
    Manifest manifest_;
};

// The content of a file of at most `cap` bytes. Throws Error.
std::string read_file(const std::string &path, std::uintmax_t cap);

// SHA-256 (FIPS 180-4), 64 hex digits.
std::string sha256(std::string_view content);

}  // namespace darcnn
