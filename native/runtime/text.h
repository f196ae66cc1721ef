// The system's files of one line. By C's functions: an extension may carry a C++ library of its own, whose streams do not work beside those of
// another one in the process.
#pragma once
#include <cstdio>
#include <string>

namespace coterie {

// Empty where there is none.
inline std::string first_line(const std::string& path) {
  std::string line;
  if (std::FILE* file = std::fopen(path.c_str(), "r")) {
    for (int c; (c = std::fgetc(file)) != EOF && c != '\n';) line += static_cast<char>(c);
    std::fclose(file);
  }
  return line;
}

}  // namespace coterie
