#include "bundle.hpp"

#include <array>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <vector>

namespace darcnn {
namespace {

constexpr std::uintmax_t kMiB = 1 << 20;
const std::map<std::string, std::uintmax_t> kMemberCaps = {{"manifest.json", kMiB},
                                                           {"detect.onnx", 64 * kMiB},
                                                           {"mask.onnx", 64 * kMiB},
                                                           {"training.json", kMiB},
                                                           {"LICENSE", kMiB}};
constexpr std::uintmax_t kFileCap = 132 * kMiB;  // all members, and 1 MiB for the zip's own tables
const char *const kAgain = "copy or download it again";
const char *const kExport = "export the model again";

[[noreturn]] void refuse(const std::string &path, const std::string &problem, const std::string &fix = kAgain) {
    throw Error(DARCNN_ERROR_BUNDLE, path, problem, fix);
}

using Word = std::uint32_t;

Word rotate(Word value, int bits) { return value >> bits | value << (32 - bits); }

// FIPS 180-4: the first 32 bits of the fractions of roots of the first primes. A double has 53 bits, of which the whole
// part takes five.
struct Constants {
    std::array<Word, 8> initial;  // square roots
    std::array<Word, 64> rounds;  // cube roots
};

Constants make_constants() {
    Constants found{};
    const auto fraction = [](double root) { return static_cast<Word>((root - std::floor(root)) * 4294967296.0); };
    std::size_t n = 0;
    for (int candidate = 2; n < 64; ++candidate) {
        bool is_prime = true;
        for (int divisor = 2; divisor * divisor <= candidate; ++divisor) is_prime &= candidate % divisor != 0;
        if (!is_prime) continue;
        if (n < 8) found.initial[n] = fraction(std::sqrt(static_cast<double>(candidate)));
        found.rounds[n++] = fraction(std::cbrt(static_cast<double>(candidate)));
    }
    return found;
}

void mix_block(std::array<Word, 8> &state, const std::array<Word, 64> &rounds, std::string_view block) {
    std::array<Word, 64> w{};
    for (std::size_t i = 0; i < 64; ++i) w[i / 4] = w[i / 4] << 8 | static_cast<unsigned char>(block[i]);
    for (std::size_t t = 16; t < 64; ++t) {
        const Word s0 = rotate(w[t - 15], 7) ^ rotate(w[t - 15], 18) ^ w[t - 15] >> 3;
        const Word s1 = rotate(w[t - 2], 17) ^ rotate(w[t - 2], 19) ^ w[t - 2] >> 10;
        w[t] = w[t - 16] + s0 + w[t - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (std::size_t t = 0; t < 64; ++t) {
        const Word s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
        const Word t1 = h + s1 + ((e & f) ^ (~e & g)) + rounds[t] + w[t];
        const Word t2 = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const Word step[] = {a, b, c, d, e, f, g, h};
    for (std::size_t i = 0; i < 8; ++i) state[i] += step[i];
}

Word crc32(std::string_view content) {  // of zip files (ISO 3309)
    std::array<Word, 256> table{};
    for (Word n = 0; n < 256; ++n) {
        table[n] = n;
        for (int bit = 0; bit < 8; ++bit) table[n] = table[n] >> 1 ^ (table[n] & 1 ? 0xEDB88320U : 0U);
    }
    Word rest = ~0U;
    for (const char c : content) rest = rest >> 8 ^ table[(rest ^ static_cast<unsigned char>(c)) & 255];
    return ~rest;
}

// One entry of a zip's central directory (PKWARE APPNOTE, 4.3.12).
struct Entry {
    std::string name;
    unsigned flags, method;
    Word crc, packed, size, offset;
};

class Zip {
  public:
    Zip(const std::string &path, std::string_view content) : path_(path), content_(content) {
        constexpr std::size_t kEndSize = 22, kMaxComment = 65535;
        if (content.substr(0, 4) != "PK\x03\x04") refuse(path, "is not a bundle", "name a .darcnn file");
        const std::size_t end = content.rfind("PK\x05\x06");
        const bool has_end = end != std::string_view::npos && end + kEndSize <= content.size() &&
                             content.size() - end <= kEndSize + kMaxComment;
        if (!has_end) refuse_damage();
        const unsigned count = number(end + 10, 2);
        std::size_t at = number(end + 16, 4);
        for (unsigned i = 0; i < count; ++i) at = read_entry(at, end);
        if (at != end) refuse_damage();
    }

    const std::vector<Entry> &entries() const { return entries_; }

    std::string_view read(const Entry &entry) const {
        constexpr unsigned kEncrypted = 1;
        if (entry.method != 0) {
            refuse(path_, entry.name + " is compressed", "use the bundle as darcnn-export wrote it, not repacked");
        }
        const std::uintmax_t cap = kMemberCaps.at(entry.name);
        if (entry.size > cap) {
            refuse(path_, entry.name + " has more than " + std::to_string(cap / kMiB) + " MiB", "export a smaller model");
        }
        constexpr std::size_t kHeader = 30;
        const std::size_t at = entry.offset;
        const std::string damaged = entry.name + " is damaged";
        if (at + kHeader > content_.size() || content_.substr(at, 4) != "PK\x03\x04") refuse(path_, damaged);
        const std::size_t n_name = number(at + 26, 2), start = at + kHeader + n_name + number(at + 28, 2);
        const bool is_whole = start + entry.size <= content_.size() && entry.packed == entry.size &&
                              content_.substr(at + kHeader, n_name) == entry.name && !(entry.flags & kEncrypted);
        if (!is_whole) refuse(path_, damaged);
        const std::string_view found = content_.substr(start, entry.size);
        if (crc32(found) != entry.crc) refuse(path_, damaged);
        return found;
    }

  private:
    [[noreturn]] void refuse_damage() const { refuse(path_, "is cut short or damaged"); }

    Word number(std::size_t at, int n_bytes) const {  // little-endian
        Word value = 0;
        for (int i = n_bytes - 1; i >= 0; --i) value = value << 8 | static_cast<unsigned char>(content_[at + i]);
        return value;
    }

    std::size_t read_entry(std::size_t at, std::size_t end) {
        constexpr std::size_t kHeader = 46;
        if (at + kHeader > end || content_.substr(at, 4) != "PK\x01\x02") refuse_damage();
        const std::size_t n_name = number(at + 28, 2);
        const std::size_t next = at + kHeader + n_name + number(at + 30, 2) + number(at + 32, 2);
        if (next > end) refuse_damage();
        entries_.push_back({std::string(content_.substr(at + kHeader, n_name)), number(at + 8, 2), number(at + 10, 2),
                            number(at + 16, 4), number(at + 20, 4), number(at + 24, 4), number(at + 42, 4)});
        return next;
    }

    const std::string &path_;
    std::string_view content_;
    std::vector<Entry> entries_;
};

JsonTable parse_table(const std::string &path, std::string_view text) {
    JsonTable table;
    try {
        table = parse_json(text);
    } catch (const JsonError &err) {
        refuse(path, std::string("manifest.json is not JSON, it ") + err.what());
    }
    if (table[""].kind != Json::Kind::object) refuse(path, "manifest.json is not a table");
    const Json &format = table["format"];
    if (!format.is_integer || format.number < 1) refuse(path, "manifest.json names no format");
    if (format.number > kFormat) {
        refuse(path, "made by a newer darcnn (this one reads up to format " + std::to_string(kFormat) + ")", "upgrade libdarcnn");
    }
    return table;
}

}  // namespace

std::string read_file(const std::string &path, std::uintmax_t cap) {
    namespace fs = std::filesystem;
    const fs::path place = fs::u8path(path);
    std::error_code error;
    const fs::file_status status = fs::status(place, error);
    if (status.type() == fs::file_type::not_found) refuse(path, "no such file", "check the path");
    if (fs::is_directory(status)) refuse(path, "is a folder", "name the file inside it");
    if (!error && !fs::is_regular_file(status)) refuse(path, "is not an ordinary file", "name another");
    const std::uintmax_t size = error ? 0 : fs::file_size(place, error);
    if (!error && size > cap) refuse(path, "has " + std::to_string(size / kMiB) + " MiB, too many", "name another file");
    std::string content(static_cast<std::size_t>(size), '\0');
    std::ifstream file(place, std::ios::binary);
    if (error || !file || !file.read(content.data(), static_cast<std::streamsize>(size))) {
        refuse(path, "cannot be read", "check the permissions and the disk");
    }
    if (content.empty()) refuse(path, "is empty");
    return content;
}

std::string sha256(std::string_view content) {
    static const Constants constants = make_constants();
    std::array<Word, 8> state = constants.initial;
    const std::size_t whole = content.size() / 64 * 64;
    for (std::size_t at = 0; at < whole; at += 64) mix_block(state, constants.rounds, content.substr(at));
    // the rest, a 1 bit, zeros, and the length in bits as the last 8 bytes of a block
    std::string tail(content.substr(whole));
    tail += '\x80';
    tail.resize(tail.size() <= 56 ? 56 : 120, '\0');
    for (int shift = 56; shift >= 0; shift -= 8) tail += static_cast<char>(std::uint64_t{content.size()} * 8 >> shift);
    for (std::size_t at = 0; at < tail.size(); at += 64) mix_block(state, constants.rounds, std::string_view(tail).substr(at));
    std::string hex;
    for (const Word word : state) {
        for (int shift = 28; shift >= 0; shift -= 4) hex += "0123456789abcdef"[word >> shift & 15];
    }
    return hex;
}

Bundle::Bundle(const std::string &path) : path_(path), content_(read_file(path, kFileCap)) {
    const Zip zip(path_, content_);
    JsonTable table;
    for (const Entry &entry : zip.entries()) {  // first: a newer format may have other members
        if (entry.name == "manifest.json") table = parse_table(path, zip.read(entry));
    }
    for (const Entry &entry : zip.entries()) {
        if (!kMemberCaps.count(entry.name)) refuse(path, "holds '" + entry.name + "', which no bundle has");
        if (!members_.emplace(entry.name, zip.read(entry)).second) refuse(path, "holds " + entry.name + " more than once");
    }
    for (const auto &[name, cap] : kMemberCaps) {
        if (!members_.count(name)) refuse(path, "lacks " + name);
    }
    try {
        manifest_ = parse_manifest(table);
    } catch (const JsonError &err) {
        refuse(path, std::string("manifest.json is wrong (") + err.what() + ")", kExport);
    }
    for (const auto &[name, content] : members_) {
        if ((name == "manifest.json") == manifest_.files.count(name) || manifest_.files.size() != members_.size() - 1) {
            refuse(path, "manifest.json does not list the other members", kExport);
        }
        if (name != "manifest.json" && sha256(content) != manifest_.files.at(name)) {
            refuse(path, name + " is not what manifest.json says (sha256)");
        }
    }
    try {
        for (const char *graph : {"detect", "mask"}) check_signature(manifest_, graph, "manifest.json", manifest_.graphs[graph]);
    } catch (const JsonError &err) {
        refuse(path, err.what(), kExport);
    }
}

}  // namespace darcnn
